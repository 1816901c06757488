"""A target must be new; if it cannot be written completely, it is removed with all folders made for it."""

from pathlib import Path

import pytest

from switchjax.config import UserError
from switchjax.interop.folders import check_new, new_folder


def test_a_bucket_is_no_folder() -> None:
    with pytest.raises(UserError, match="mount the bucket"):
        check_new(Path("gs://bucket/model"))
    assert not Path("gs:").exists()


def test_what_is_written_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a/b"):
        (tmp_path / "a/b/file").touch()
    assert (tmp_path / "a/b/file").exists()
    with pytest.raises(UserError, match=r"a/b already exists"), new_folder(tmp_path / "a/b"):
        raise AssertionError("not reached")
    assert (tmp_path / "a/b/file").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), UserError("no")])
@pytest.mark.parametrize("there", [(), ("a",), ("a", "a/b")])
def test_what_failed_is_removed_and_what_was_there_is_not(
    tmp_path: Path, there: tuple[str, ...], error: BaseException
) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    (tmp_path / "other").touch()

    def write() -> None:
        with new_folder(tmp_path / "a/b"):
            (tmp_path / "a/b/c").mkdir()
            (tmp_path / "a/b/c/file").touch()
            (tmp_path / "a/b/file").touch()
            raise error

    full = isinstance(error, OSError)
    with pytest.raises(UserError if full else type(error), match=r"a/b: .*No space left" if full else None):
        write()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {*there, "other"}


@pytest.mark.parametrize("name", ["file/a/b", "file", "n" * 300, "link"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot write to|already exists"), new_folder(tmp_path / name):
        raise AssertionError("not reached")
    assert (tmp_path / "file").read_text() == "content"
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_new(tmp_path: Path) -> None:
    check_new(tmp_path)
    check_new(tmp_path / "nowhere")
