"""Converts arrays between our layout and transformers' with one einops pattern for both directions.

`"d h a -> (h a) d"` means that our query kernel [D, H, A] is transformers' matrix [H A, D].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Shaped

from switchjax.config import ModelConfig

_AXES = re.compile(r"\([^)]*\)|\S+")


@dataclass(frozen=True)
class Layout:
    """A pattern `ours -> theirs`."""

    pattern: str
    """Our axes, an arrow, transformers' axes; axes in brackets are merged into one."""
    sizes: Mapping[str, int]
    """Sizes of the axes that are in brackets on either side."""

    def to_theirs(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Our array in transformers' layout."""
        return rearrange(array, self.pattern, **self._used())

    def to_ours(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The inverse of `to_theirs`."""
        ours, _, theirs = self.pattern.partition(" -> ")
        return rearrange(array, f"{theirs} -> {ours}", **self._used())

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in transformers' layout of our array of `shape`."""
        ours, _, theirs = self.pattern.partition(" -> ")
        sizes = {"1": 1, **self.sizes, **dict(zip(_AXES.findall(ours), shape, strict=True))}
        return tuple(math.prod(sizes[axis] for axis in group.strip("()").split()) for group in _AXES.findall(theirs))

    def _used(self) -> dict[str, int]:
        names = re.findall(r"[a-z]", self.pattern)
        return {axis: size for axis, size in self.sizes.items() if axis in names}


def axis_sizes(model: ModelConfig) -> dict[str, int]:
    """Sizes of the axes that are in brackets in the families' patterns."""
    return {"a": model.d_head, "p": model.patch_size, "q": model.patch_size, "c": model.image_channels}
