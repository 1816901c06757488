"""A table finds its place in a document."""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from switchjax.analysis.document import origin, read_tables, show_origin, write_table
from switchjax.config import UserError

MARKED = "before\n<!-- make table -->\nold\n<!-- end -->\nafter\n<!-- other -->\nkept\n<!-- end -->\n"


def test_the_table_replaces_the_one_of_the_same_command_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text(MARKED)
    write_table(path, "make table", "| new |")
    assert path.read_text() == MARKED.replace("old", "| new |")
    write_table(path, "other", "| too |")
    assert path.read_text() == MARKED.replace("old", "| new |").replace("kept", "| too |")


@pytest.mark.parametrize("text", [None, "no marks", "<!-- make table -->\nno end"])
def test_a_document_without_the_marks_is_left_as_it_is(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "doc.md"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"doc\.md has no lines '<!-- make table -->' and '<!-- end -->'"):
        write_table(path, "make table", "| new |")
    assert path.exists() == (text is not None)
    assert text is None or path.read_text() == text


def test_figures_say_where_they_come_from() -> None:
    found = origin("make table")
    assert date.fromisoformat(found["date"]) <= date.today()
    assert f"jax {version('jax')}," in found["versions"]
    assert "load" in found["machine"]
    assert all(value in show_origin(found) for value in found.values())


def test_the_tables_of_a_text_are_read_back() -> None:
    text = "| a | | b |\n|---|---:|:---|\n| 1 | -- x | |\n\nbetween\n| c |\n|---|\n\n| d |\n|---|\n| - 2 |\n"
    assert read_tables(text) == [[["a", "", "b"], ["1", "-- x", ""]], [["c"]], [["d"], ["- 2"]]]
