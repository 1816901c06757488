"""The folders that models are written to: new ones, and nothing is left of them where writing fails."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from switchjax.config import UserError
from switchjax.training.workdir import check_mounted

_TRIES, _PAUSE = 20, 0.1  # seconds


def check_new(folder: Path) -> None:
    """Raises a `UserError` if there is anything in the folder, or no telling, or if it is a bucket's address."""
    check_mounted(folder)
    try:
        taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if taken:
        raise UserError(f"{folder} is there already: choose another folder, or an empty one")


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder for what is written meanwhile, which is removed again if that fails or is interrupted.

    A part of a model would be of no use, and in the way when the command is repeated.

    Raises:
        UserError: as `check_new`; or if anything cannot be written.
    """
    check_new(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        _remove(folder, made)
        if isinstance(error, OSError | SafetensorError):  # the latter is what save_file makes of the former
            raise UserError(f"cannot write to {folder}: {error}") from None
        raise


def _remove(folder: Path, made: Sequence[Path]) -> None:
    """Empties a folder, and removes those of `made` that are empty then, inner ones first; as far as can be.

    When one of a checkpoint's writes has failed others go on, and make their folders anew: until none comes back.
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
