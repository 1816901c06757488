"""A table finds its place in a document."""

from pathlib import Path

import pytest

from switchjax.config import UserError
from switchjax.studies.markdown import read_tables, show_row, write_table

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


def test_a_document_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--write: cannot read"):
        write_table(tmp_path, "make table", "| new |")


def test_a_row_is_read_back() -> None:
    assert read_tables(f"{show_row(['a', 1])}\n|---|---:|") == [[["a", "1"]]]


def test_the_tables_of_a_text_are_read_back() -> None:
    text = "| a | | b |\n|---|---:|:---|\n| 1 | -- x | |\n\nbetween\n| c |\n|---|\n\n| d |\n|---|\n| - 2 |\n"
    assert read_tables(text) == [[["a", "", "b"], ["1", "-- x", ""]], [["c"]], [["d"], ["- 2"]]]
