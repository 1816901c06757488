"""Tables in Markdown, and their places in documents, which the commands that make them fill."""

from collections.abc import Sequence
from pathlib import Path

from switchjax.config import UserError

LEFT, RIGHT = "---", "---:"
"""Alignments of a column."""


def make_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def make_table(head: Sequence[str], alignments: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with these labels above its columns; an empty label leaves its cell blank."""
    labels = "".join(f" {label} |" if label else " |" for label in head)
    return "\n".join([f"|{labels}", f"|{'|'.join(alignments)}|", *map(make_row, rows)])


def find_place(path: Path, command: str) -> tuple[str, str]:
    """Returns what stands before and after the tables of `command` in a document, the marks around them included.

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


def write_tables(path: Path, command: str, tables: str) -> None:
    """Puts `tables` in the place of `command` in a document.

    Raises:
        UserError: if the document cannot be read or written, or does not have the marks.
    """
    before, after = find_place(path, command)
    try:
        path.write_text(f"{before}{tables}\n{after}")
    except OSError as error:
        raise UserError(f"--write: cannot write {path} ({error.strerror})") from None
