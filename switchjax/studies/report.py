"""Writes the rows of studies: Markdown tables for documents, JSON for programs.

A row is a frozen dataclass. An annotation such as `Annotated[float, number("tokens/s", "{:,.0f}".format)]` says how
Markdown shows a field; JSON has the values of all fields, also of those that are not shown.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from switchjax.planning.report import write_json
from switchjax.studies.markdown import LEFT, RIGHT, make_row, make_table, write_tables
from switchjax.studies.provenance import find_provenance

_log = logging.getLogger(__name__)
Row = Any
"""An instance of a frozen dataclass."""


@dataclasses.dataclass(frozen=True)
class Column:
    """How a field is shown.

    Attributes:
        label: above the column; `{name}` stands for that field of the table's first row.
        show: makes a cell of a value.
        missing: the cell of None. A column of nothing else is left out.
        align: of the column.
    """

    label: str
    show: Callable[[Any], str] = str
    missing: str = ""
    align: str = LEFT

    def cell(self, value: Any) -> str:
        """Shows a value."""
        return self.missing if value is None else self.show(value)


text = Column
"""Shows a field in a left-aligned column."""
number = partial(Column, align=RIGHT)
"""Shows a field in a right-aligned column."""


@dataclasses.dataclass(frozen=True)
class Figure(Column):
    """Shows a field in a line of its own; a mapping takes a line a key, for which `{key}` in the label stands."""

    aim: str = ""


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a cell: `26.0 %`."""
    return f"{100 * fraction:.{digits}f} %"


def to_markdown(rows: Iterable[Row]) -> str:
    """Makes one table of each class of rows, in the order of the rows."""
    return "\n\n".join(_table(table) for table in _by_class(rows))


def to_json(rows: Iterable[Row]) -> list[list[dict[str, Any]]]:
    """Returns the fields of all rows, table by table."""
    return [[dataclasses.asdict(row) for row in table] for table in _by_class(rows)]


def figures_table(records: Mapping[str, Row]) -> str:
    """Makes a table of records of one class side by side, under their names: each field is a line."""
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
    return make_table(head, [LEFT, *[RIGHT] * (len(head) - 1)], lines)


def publish(rows: Iterable[Row], command: str, write: Path | None = None, json: Path | None = None) -> None:
    """Logs each row as soon as it is found, then prints the tables and where they come from.

    Args:
        rows: what a study finds.
        command: what was called, which marks the tables' place in documents.
        write: a document to put the tables into.
        json: a file for the numbers.

    Raises:
        UserError: as the study, or if a file cannot be written.
    """
    found = []
    for row in rows:
        found.append(row)
        _log.info("%s", make_row(_cells(row, _columns(row))))
    provenance = find_provenance(command)
    shown = f"{to_markdown(found)}\n\n{provenance}"
    print(shown)
    if json:
        write_json(json, dataclasses.asdict(provenance) | {"tables": to_json(found)})
    if write:
        write_tables(write, command, shown)


def _table(rows: Sequence[Row]) -> str:
    columns = _columns(rows[0])
    if any(isinstance(column, Figure) for column in columns.values()):
        return figures_table({"": rows[0]})
    columns = {name: column for name, column in columns.items() if any(getattr(row, name) is not None for row in rows)}
    labels = [column.label.format(**vars(rows[0])) for column in columns.values()]
    return make_table(labels, [column.align for column in columns.values()], [_cells(row, columns) for row in rows])


def _by_class(rows: Iterable[Row]) -> Iterator[list[Row]]:
    return (list(table) for _, table in itertools.groupby(rows, type))


def _columns(row: Row) -> dict[str, Any]:
    """The columns of a row's fields, by name."""
    hints = get_type_hints(type(row), include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _cells(row: Row, columns: Mapping[str, Column]) -> list[str]:
    return [column.cell(getattr(row, name)) for name, column in columns.items()]
