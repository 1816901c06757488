"""Writes the rows of studies: Markdown tables for documents, JSON for programs.

A row is a frozen dataclass. An annotation such as `Annotated[float, number("tokens/s", "{:,.0f}".format)]` says how
Markdown shows a field; JSON has the values of all fields, shown or not.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from switchjax.config import UserError
from switchjax.planning.report import write_json
from switchjax.studies.provenance import find_provenance

_log = logging.getLogger(__name__)
_LEFT, _RIGHT = "---", "---:"
Row = Any
"""An instance of a frozen dataclass."""


@dataclasses.dataclass(frozen=True)
class Column:
    """How Markdown shows a field."""

    label: str
    """Above the column; `{name}` stands for that field of the table's first row."""
    show: Callable[[Any], str] = str
    """Makes a cell from a value."""
    missing: str = ""
    """The cell of None. A column with no other values is left out."""
    align: str = _LEFT

    def cell(self, value: Any) -> str:
        """The cell of a value."""
        return self.missing if value is None else self.show(value)


text = Column
"""Shows a field in a left-aligned column."""
number = partial(Column, align=_RIGHT)
"""Shows a field in a right-aligned column."""


@dataclasses.dataclass(frozen=True)
class Figure(Column):
    """Shows a field in a line of its own; a mapping gets one line for each key, which replaces `{key}` in the label."""

    aim: str = ""


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in percent: `26.0 %`."""
    return f"{100 * fraction:.{digits}f} %"


def listed(record: Any) -> str:
    """The fields of a dataclass, as `64, 4096, 1`."""
    return ", ".join(str(value) for value in vars(record).values())


def to_markdown(rows: Iterable[Row]) -> str:
    """Makes one table for each class of rows, in the order of the rows."""
    return "\n\n".join(_table(table) for table in _by_class(rows))


def to_json(rows: Iterable[Row]) -> list[list[dict[str, Any]]]:
    """Returns the fields of all rows, table by table."""
    return [[dataclasses.asdict(row) for row in table] for table in _by_class(rows)]


def figures_table(records: Mapping[str, Row]) -> str:
    """A table of records of one class: a column for each record, headed by its name, and a line for each field."""
    lines, aims = [], []
    for name, column in _columns(first := next(iter(records.values()))).items():
        values = [getattr(record, name) for record in records.values()]
        for key in values[0] if isinstance(values[0], Mapping) else [None]:
            label = column.label.format(**vars(first), key=key)
            lines.append([label, *(column.cell(value if key is None else value[key]) for value in values)])
            aims.append(column.aim)
    head = ["", *records]
    if any(aims):
        head, lines = [*head, "aim"], [[*line, aim] for line, aim in zip(lines, aims, strict=True)]
    return _make_table(head, [_LEFT, *[_RIGHT] * (len(head) - 1)], lines)


def publish(rows: Iterable[Row], command: str, write: Path | None = None, json: Path | None = None) -> None:
    """Logs each row as soon as a study yields it, then prints the tables and their provenance.

    Args:
        rows: the study's.
        command: the command line, which also marks the tables' place in documents.
        write: a document to put the tables into.
        json: a file for the numbers.
    """
    found = []
    for row in rows:
        found.append(row)
        _log.info("%s", _make_line(_cells(row, _columns(row))))
    provenance = find_provenance(command)
    shown = f"{to_markdown(found)}\n\n{provenance}"
    print(shown)
    if json:
        write_json(json, dataclasses.asdict(provenance) | {"tables": to_json(found)})
    if write:
        write_tables(write, command, shown)


def find_place(path: Path, command: str) -> tuple[str, str]:
    """The text before and after the tables of `command` in a document, including the marks around them.

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
    """Puts `tables` in the place of `command` in a document; raises as `find_place`, or if it cannot be written."""
    before, after = find_place(path, command)
    try:
        path.write_text(f"{before}{tables}\n{after}")
    except OSError as error:
        raise UserError(f"--write: cannot write {path} ({error.strerror})") from None


def _table(rows: Sequence[Row]) -> str:
    columns = _columns(rows[0])
    if any(isinstance(column, Figure) for column in columns.values()):
        return figures_table({"": rows[0]})
    columns = {name: column for name, column in columns.items() if any(getattr(row, name) is not None for row in rows)}
    labels = [column.label.format(**vars(rows[0])) for column in columns.values()]
    return _make_table(labels, [column.align for column in columns.values()], [_cells(row, columns) for row in rows])


def _make_table(head: Sequence[str], alignments: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    labels = "".join(f" {label} |" if label else " |" for label in head)
    return "\n".join([f"|{labels}", f"|{'|'.join(alignments)}|", *map(_make_line, rows)])


def _make_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_class(rows: Iterable[Row]) -> Iterator[list[Row]]:
    return (list(table) for _, table in itertools.groupby(rows, type))


def _columns(row: Row) -> dict[str, Any]:
    """Field -> how it is shown, for each field that is shown."""
    hints = get_type_hints(type(row), include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _cells(row: Row, columns: Mapping[str, Column]) -> list[str]:
    return [column.cell(getattr(row, name)) for name, column in columns.items()]
