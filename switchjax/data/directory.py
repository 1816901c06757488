"""The directory where prepared data lives: where it is, and how nothing unfinished in it is ever used."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from switchjax.config import UserError, user_cache


def data_directory(configured: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Where prepared data lives: as configured, $SWITCHJAX_DATA, or the user's cache folder."""
    if configured or environment.get("SWITCHJAX_DATA"):
        return Path(configured or environment["SWITCHJAX_DATA"]).expanduser()
    return user_cache(environment)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds `directory` against other processes on this machine; a killed process lets go of it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever left an unfinished folder behind no longer runs.
        for leftover in directory.glob("unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def preparing(configured: str) -> Iterator[Path]:
    """The directory where prepared data lives, held against other processes.

    Raises:
        UserError: if anything in it cannot be read or written.
    """
    directory = data_directory(configured)
    try:
        with exclusive(directory):
            yield directory
    except OSError as error:
        raise UserError(f"cannot prepare data in {directory}: {error}") from None


@contextlib.contextmanager
def unfinished(directory: Path) -> Iterator[Path]:
    """A folder on the same file system as `directory`, gone afterwards; what is complete is renamed out of it."""
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=directory) as folder:
        yield Path(folder)
