"""What is computed once: complete or not there, and made again where it is damaged."""

from pathlib import Path

import pytest

from switchjax.data.cache import cached
from switchjax.data.directory import locked

NAME = Path("tokens") / "tales"


def load(path: Path) -> str:
    text = (path / "text").read_text()
    if text == "damaged":
        raise ValueError("it does not hold what was written")
    return text


class Writer:
    """Writes how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.mkdir()
        (path / "text").write_text(f"made {self.calls}")


def test_it_is_made_once_and_again_where_it_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write = Writer()
    with locked(tmp_path):
        assert [cached(tmp_path, NAME, load, write) for _ in range(2)] == ["made 1", "made 1"]
        assert not caplog.messages
        (tmp_path / NAME / "text").write_text("damaged")
        assert cached(tmp_path, NAME, load, write) == "made 2"
    assert caplog.messages == [f"rebuilding {NAME}, which is damaged: ValueError('it does not hold what was written')"]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["tales"]


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        Writer()(path)
        raise OSError("disk full")

    with locked(tmp_path):
        with pytest.raises(OSError, match="disk full"):
            cached(tmp_path, NAME, load, fail)
        assert not (tmp_path / NAME).exists()
        assert not list(tmp_path.glob("unfinished*"))
