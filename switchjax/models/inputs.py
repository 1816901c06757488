"""What the layers of a stack see besides the residual stream."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossInputs:
    """What the cross-attention of a decoder attends to."""

    encoded: Any
    """`Float[Array, "B M D"]`; None where each layer's cache has the keys and values of it."""
    mask: Bool[Array, "B 1 L M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackInputs:
    """What every layer of a stack sees; N keys, those of the L tokens themselves or of a cache."""

    tokens: Int[Array, "B L"] | None
    """Vocabulary ids; None for images."""
    segments: Int[Array, "B L"]
    self_mask: Bool[Array, "B 1 L N"]
    self_bias: Float[Array, "#B H L N"] | None
    positions: Int[Array, "B L"] | None
    """By which queries and keys are rotated; None: they are not."""
    cross: CrossInputs | None
    slots: Int[Array, "B L"] | None = None
    """Where in the cache the tokens' keys and values go, N for padding; None without a cache."""

    @property
    def token_mask(self) -> Bool[Array, "B L"]:
        """False for padding."""
        return self.segments > 0
