"""What is computed from a dataset once and kept on disk."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from switchjax.data.directory import unfinished

_log = logging.getLogger(__name__)
_Content = TypeVar("_Content")


class UnusableCache(Exception):
    """A cache on disk that is not what was written."""


def cached(directory: Path, name: Path, load: Callable[[Path], _Content], write: Callable[[Path], None]) -> _Content:
    """What `load` finds in the folder `name` of `directory`; made first, or again, where it is absent or damaged.

    The folder appears complete or not at all. Call it under `directory.exclusive`.

    Args:
        directory: where prepared data lives.
        name: relative path of the folder.
        load: reads such a folder; raises `FileNotFoundError` or `UnusableCache`.
        write: makes such a folder at the path that it is given.
    """
    path = directory / name
    try:
        return load(path)
    except FileNotFoundError:
        pass
    except UnusableCache as error:
        _log.warning("%s is made again: %s", name, error)
    with unfinished(directory) as folder:
        write(folder / "complete")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.rename(path, folder / "unusable")
        os.rename(folder / "complete", path)
    return load(path)
