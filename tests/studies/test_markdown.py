"""A table finds its place in a document."""

from pathlib import Path

import pytest

from switchjax.config import UserError
from switchjax.studies.markdown import write_tables

MARKED = "before\n<!-- make table -->\nold\n<!-- end -->\nafter\n<!-- other -->\nkept\n<!-- end -->\n"


def test_the_table_replaces_the_one_of_the_same_command_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text(MARKED)
    write_tables(path, "make table", "| new |")
    assert path.read_text() == MARKED.replace("old", "| new |")
    write_tables(path, "other", "| too |")
    assert path.read_text() == MARKED.replace("old", "| new |").replace("kept", "| too |")


@pytest.mark.parametrize("text", [None, "no marks", "<!-- make table -->\nno end"])
def test_a_document_without_the_marks_is_left_as_it_is(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "doc.md"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"doc\.md has no lines '<!-- make table -->' and '<!-- end -->'"):
        write_tables(path, "make table", "| new |")
    assert path.exists() == (text is not None)
    assert text is None or path.read_text() == text


def test_a_document_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--write: cannot read"):
        write_tables(tmp_path, "make table", "| new |")
