"""Makes new folders for models, and removes them if writing fails."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from switchjax.config import UserError
from switchjax.training.workdir import check_mounted

_TRIES, _PAUSE = 20, 0.1  # pause in seconds


def check_new(folder: Path) -> None:
    """Raises a `UserError` if the folder is not empty, cannot be inspected, or is a bucket's address."""
    check_mounted(folder)
    try:
        taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if taken:
        raise UserError(f"{folder} already exists: choose a new or an empty folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, and removes it again if the body fails or is interrupted.

    An incomplete model is useless, and would block the same command when it is repeated.

    Raises:
        UserError: as in `check_new`; also if anything cannot be written.
    """
    check_new(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        _remove(folder, made)
        if isinstance(error, OSError | SafetensorError):  # save_file turns an OSError into a SafetensorError
            raise UserError(f"cannot write to {folder}: {error}") from None
        raise


def _remove(folder: Path, made: Sequence[Path]) -> None:
    """Empties a folder and removes the folders of `made` that are then empty, inner ones first, as far as possible.

    After one write of a checkpoint fails, other writes continue in the background and may create their folders again.
    Hence this repeats until nothing comes back.
    """
    for _ in range(_TRIES):
        for path in _content(folder):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        for path in made:
            with suppress(OSError):
                path.rmdir()
        time.sleep(_PAUSE)
        if not _content(folder):
            return


def _content(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
