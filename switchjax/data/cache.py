"""Keeps on disk what is computed from a dataset once."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from switchjax.data.directory import scratch_folder

_log = logging.getLogger(__name__)
_Content = TypeVar("_Content")


def cached(directory: Path, name: Path, load: Callable[[Path], _Content], write: Callable[[Path], None]) -> _Content:
    """Returns what `load` reads from the folder `directory / name`; `write` makes it if it is missing or damaged.

    The folder appears only when complete. The caller holds `directory.locked`.

    Args:
        directory: where prepared data lives.
        name: relative path of the folder.
        load: reads the folder; raises an error of one of the types caught below if a file is missing or damaged.
        write: makes the folder at the path that it is given.
    """
    path = directory / name
    try:
        return load(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("rebuilding %s, which is damaged: %r", name, error)
    with scratch_folder(directory) as folder:
        write(folder / "complete")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.rename(path, folder / "unusable")
        os.rename(folder / "complete", path)
    return load(path)
