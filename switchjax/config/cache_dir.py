"""The folder on the user's machine for files that can be made again."""

import os
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The project's folder in $XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchjax"
