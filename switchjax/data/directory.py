"""The directory of prepared data: its path, its lock, and scratch folders for unfinished work."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from switchjax.config import UserError, user_cache


def data_directory(configured: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The configured path, else $SWITCHJAX_DATA, else the user's cache folder."""
    if configured or environment.get("SWITCHJAX_DATA"):
        return Path(configured or environment["SWITCHJAX_DATA"]).expanduser()
    return user_cache(environment)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks `directory` against other processes on this machine; the lock of a killed process is released."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # This process holds the lock, so the owner of any remaining scratch folder was killed.
        for leftover in directory.glob("unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def locked_data_directory(configured: str) -> Iterator[Path]:
    """Yields the directory of prepared data, locked against other processes.

    Raises:
        UserError: if anything in it cannot be read or written.
    """
    directory = data_directory(configured)
    try:
        with locked(directory):
            yield directory
    except OSError as error:
        raise UserError(f"cannot prepare data in {directory}: {error}") from None


@contextlib.contextmanager
def scratch_folder(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder inside `directory`, so that complete work can be moved out of it by a rename."""
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=directory) as folder:
        yield Path(folder)
