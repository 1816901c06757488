"""The writer: columns, figures and JSON of rows, and their places in documents."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from switchjax.config import UserError
from switchjax.studies.report import (
    Figure,
    figures_table,
    number,
    percent,
    publish,
    text,
    to_json,
    to_markdown,
    write_tables,
)
from switchjax.studies.timing import Ratio


@dataclass(frozen=True)
class Speed:
    model: Annotated[str, text("model")]
    speed: Annotated[float, number("{tokens} tokens, tokens/s", "{:,.0f}".format)]
    ratio: Annotated[Ratio | None, number("", missing="-")]
    peak: Annotated[float | None, number("MFU")]
    tokens: int


@dataclass(frozen=True)
class Total:
    loss: Annotated[float, Figure("loss", "{:.2f}".format, aim="below 2")]
    losses: Annotated[dict[str, float], Figure("... {key}", "{:.1f}".format)]
    steps: int


MARKED = "before\n<!-- make table -->\nold\n<!-- end -->\nafter\n<!-- other -->\nkept\n<!-- end -->\n"
FAST, SLOW = Speed("a", 12345.6, None, None, 8), Speed("b", 9.0, Ratio(1.5, 1.0, 2.25), None, 8)
TOTAL = Total(1.234, {"tales": 2.0, "yarns": 3.0}, 7)


def test_fields_are_columns_and_a_column_of_nothing_is_left_out() -> None:
    assert to_markdown([FAST, SLOW]).splitlines() == [
        "| model | 8 tokens, tokens/s | |",
        "|---|---:|---:|",
        "| a | 12,346 | - |",
        "| b | 9 | 1.50 (1.00 to 2.25) |",
    ]
    assert to_markdown([FAST]).splitlines()[0] == "| model | 8 tokens, tokens/s |"


def test_each_class_of_rows_has_a_table_and_figures_have_lines() -> None:
    first, second = to_markdown([FAST, TOTAL]).split("\n\n")
    assert first == to_markdown([FAST])
    assert second.splitlines() == [
        "| | | aim |",
        "|---|---:|---:|",
        "| loss | 1.23 | below 2 |",
        "| ... tales | 2.0 |  |",
        "| ... yarns | 3.0 |  |",
    ]
    assert figures_table({"one": TOTAL, "two": TOTAL}).splitlines()[:3] == [
        "| | one | two | aim |",
        "|---|---:|---:|---:|",
        "| loss | 1.23 | 1.23 | below 2 |",
    ]


def test_json_has_every_number_as_it_is() -> None:
    tables = to_json([FAST, SLOW, TOTAL])
    assert tables[0][1] == {
        "model": "b",
        "speed": 9.0,
        "ratio": {"median": 1.5, "low": 1.0, "high": 2.25},
        "peak": None,
        "tokens": 8,
    }
    assert tables[1] == [{"loss": 1.234, "losses": {"tales": 2.0, "yarns": 3.0}, "steps": 7}]


def test_fractions_are_shown_as_percent() -> None:
    assert percent(0.2604) == "26.0 %"
    assert percent(0.9999, digits=2) == "99.99 %"


def test_rows_are_logged_as_they_come_then_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    document, numbers = tmp_path / "doc.md", tmp_path / "numbers.json"
    document.write_text("<!-- make it -->\nold\n<!-- end -->\n")

    def study() -> Iterator[Speed]:
        yield FAST
        assert caplog.messages == ["| a | 12,346 | - |  |"]
        yield SLOW

    with caplog.at_level("INFO", "switchjax"):
        publish(study(), "make it", document, numbers)
    shown = capsys.readouterr().out
    assert shown.startswith(to_markdown([FAST, SLOW]) + "\n\n`make it`, ")
    assert document.read_text() == f"<!-- make it -->\n{shown}<!-- end -->\n"
    written = json.loads(numbers.read_text())
    assert written["command"] == "make it"
    assert written["tables"] == to_json([FAST, SLOW])


def test_the_table_replaces_the_one_of_the_same_command_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text(MARKED)
    write_tables(path, "make table", "| new |")
    assert path.read_text() == MARKED.replace("old", "| new |")
    write_tables(path, "other", "| too |")
    assert path.read_text() == MARKED.replace("old", "| new |").replace("kept", "| too |")


@pytest.mark.parametrize("old", [None, "no marks", "<!-- make table -->\nno end"])
def test_a_document_without_the_marks_is_left_as_it_is(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "doc.md"
    if old is not None:
        path.write_text(old)
    with pytest.raises(UserError, match=r"doc\.md has no lines '<!-- make table -->' and '<!-- end -->'"):
        write_tables(path, "make table", "| new |")
    assert path.exists() == (old is not None)
    assert old is None or path.read_text() == old


def test_a_document_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--write: cannot read"):
        write_tables(tmp_path, "make table", "| new |")
