"""Where things that can be made again are kept on the user's machine."""

import os
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The project's folder in the user's cache: in $XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchjax"
