"""Tables that a command puts into a document, so that no figure in it is older than its command."""

from pathlib import Path

from switchjax.config import UserError


def write_table(path: Path, command: str, table: str) -> None:
    """Puts `table` between the two marks of `command` in a document.

    Raises:
        UserError: if the document does not have them.
    """
    start, end = f"<!-- {command} -->\n", "<!-- end -->"
    text = path.read_text() if path.exists() else ""
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no lines '{start.strip()}' and '{end}' to put the table between")
    path.write_text(f"{before}{start}{table}\n{end}{after}")
