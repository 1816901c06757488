"""Tables in Markdown: their rows, and their places in documents, which the commands that make them fill."""

from collections.abc import Iterable
from pathlib import Path

from switchjax.config import UserError

AIM_HEAD = ["| | | aim |", "|---|---:|---:|"]
"""Of a table of single figures."""


def show_row(cells: Iterable[object]) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def find_place(path: Path, command: str) -> tuple[str, str]:
    """What stands before and after the table of `command` in a document, the marks around it included.

    Raises:
        UserError: if the document cannot be read, or does not have the marks.
    """
    start, end = f"<!-- {command} -->\n", "<!-- end -->"
    try:
        text = path.read_text() if path.exists() else ""
    except OSError as error:
        raise UserError(f"--write: cannot read {path} ({error.strerror})") from None
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no lines '{start.strip()}' and '{end}' to put the table between")
    return before + start, end + after


def write_table(path: Path, command: str, table: str) -> None:
    """Puts `table` in the place of `command` in a document.

    Raises:
        UserError: if the document cannot be read or written, or does not have the marks.
    """
    before, after = find_place(path, command)
    try:
        path.write_text(f"{before}{table}\n{after}")
    except OSError as error:
        raise UserError(f"--write: cannot write {path} ({error.strerror})") from None


def read_tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, row by row, those of its head first."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not all(set(cell) <= set("-:") and cell for cell in cells):
            tables[-1].append(cells)
    return tables
