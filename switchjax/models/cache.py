"""A decoder's memory of the tokens it has read, so that the next token does not need the whole text again.

A cache mirrors the stack: a list for each scanned module, with an entry for each block of its period. The entry's
arrays are stacked over the repeats and scanned together with the parameters.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from switchjax.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """The keys and values of an attention; with a first axis of layers if these are stacked."""

    # Float[Array, "B L N A"]; not annotated as such, because JAX also builds trees of placeholders.
    keys: Any
    values: Any

    @classmethod
    def empty(cls, rows: int, length: int, heads: int, d_head: int, dtype: DTypeLike) -> "KeyValues":
        """Room for `length` tokens a row."""
        zeros = constrain(jnp.zeros((rows, length, heads, d_head), dtype), "batch", "length", "heads", "head")
        return cls(zeros, zeros)

    def write(self, new: "KeyValues", slots: Int[Array, "B T"]) -> "KeyValues":
        """Adds keys and values of T new tokens per row at `slots`; slot L means that a token is not written."""

        def put(old: Array, new: Array) -> Array:
            written = jax.vmap(lambda row, tokens, at: row.at[at].set(tokens, mode="drop"))(old, new, slots)
            return constrain(written, "batch", "length", "heads", "head")

        return KeyValues(put(self.keys, new.keys), put(self.values, new.values))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LSTMState:
    """The state of an LSTM layer after the tokens so far."""

    hidden: Any
    """`Float[Array, "B D"]`."""
    cell: Any
    """`Float[Array, "B cells"]`."""


State = KeyValues | LSTMState | None
"""The part of a layer's memory that changes with each token; None for a layer without memory."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """The memory of a layer: its state, and the keys and values that its cross-attention attends to."""

    state: Any = None
    """`State`."""
    cross: Any = None
    """`KeyValues` of the encoder's output, computed once; None without an encoder."""


def seen(new: KeyValues, cache: LayerCache | None, slots: Int[Array, "B T"] | None) -> KeyValues:
    """The keys and values for self-attention: of T new tokens, and of all tokens before them if there is a cache."""
    return new if cache is None else cache.state.write(new, slots)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The state of a decoder that has read `lengths` tokens of each row."""

    lengths: Any
    """`Int[Array, "B"]`."""
    layers: list[list[LayerCache]]
    """The memory of each block of each scan."""
    encoded_segments: Any
    """`Int[Array, "B M"]`, 0 for the encoder's padding; None without an encoder."""
    max_length: int = field(metadata={"static": True})
    """Largest number of tokens per row; the caller must not read more."""

    def positions(self, count: int) -> Int[Array, "B T"]:
        """The positions of the next `count` tokens of each row."""
        positions = self.lengths[:, None] + jnp.arange(count)[None]
        # Only padding lies beyond the end, but a table of positions would give NaN there.
        return jnp.minimum(positions, self.max_length - 1)

    def repeat(self, count: int) -> "Cache":
        """The cache with `count` consecutive copies of each row."""

        def again(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda x: jnp.repeat(x, count, axis=axis), tree)

        lengths, segments = again((self.lengths, self.encoded_segments), axis=0)
        return replace(self, lengths=lengths, layers=again(self.layers, axis=1), encoded_segments=segments)

    def select(self, beams: Int[Array, "B K"]) -> "Cache":
        """The cache whose rows are chosen by number within each group of K consecutive rows.

        All rows of a group have the same encoder inputs, so nothing that comes from the encoder moves.
        """

        def take(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda x: _take_rows(x, beams, axis), tree)

        layers = [[replace(layer, state=take(layer.state, axis=1)) for layer in scan] for scan in self.layers]
        return replace(self, lengths=take(self.lengths, axis=0), layers=layers)


def _take_rows(x: Array, beams: Int[Array, "B K"], axis: int) -> Array:
    """The rows with the numbers `beams` within each group of K; a group lies on one device, so no bytes move."""
    groups = x.reshape(*x.shape[:axis], *beams.shape, *x.shape[axis + 1 :])
    taken = jax.vmap(lambda group, index: jnp.take(group, index, axis=axis), (axis, 0), axis)(groups, beams)
    return taken.reshape(x.shape)
