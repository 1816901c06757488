"""What a decoder keeps of the tokens it has read, so that the next one costs one step and not the whole text again.

A cache mirrors the stack: a list for each scanned module, with an entry for each block of its period, whose arrays are
stacked over the repeats and scanned along with the parameters.
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
    """Keys and values that attention attends to; with a first axis of layers where these are stacked."""

    # Float[Array, "B L N A"]; not in the types, because JAX also builds trees of placeholders.
    keys: Any
    values: Any

    @classmethod
    def empty(cls, rows: int, length: int, heads: int, d_head: int, dtype: DTypeLike) -> "KeyValues":
        """Room for `length` tokens a row."""
        zeros = constrain(jnp.zeros((rows, length, heads, d_head), dtype), "batch", "length", "heads", "head")
        return cls(zeros, zeros)

    def write(self, new: "KeyValues", slots: Int[Array, "B T"]) -> "KeyValues":
        """These, with those of T new tokens a row at `slots`; a slot of L is none."""

        def put(old: Array, new: Array) -> Array:
            written = jax.vmap(lambda row, tokens, at: row.at[at].set(tokens, mode="drop"))(old, new, slots)
            return constrain(written, "batch", "length", "heads", "head")

        return KeyValues(put(self.keys, new.keys), put(self.values, new.values))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LSTMState:
    """What an LSTM layer knows of the tokens so far."""

    hidden: Any
    """`Float[Array, "B D"]`."""
    cell: Any
    """`Float[Array, "B cells"]`."""


State = KeyValues | LSTMState | None
"""What changes from token to token; None for a layer that remembers nothing."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """What a layer remembers, and what its cross-attention attends to: computed once, from the encoder's output."""

    state: Any = None
    """`State`."""
    cross: Any = None
    """`KeyValues`, in a decoder of an encoder's output."""


def seen(new: KeyValues, cache: LayerCache | None, slots: Int[Array, "B T"] | None) -> KeyValues:
    """What self-attention attends to: the keys and values of T new tokens, and those that the cache has before them."""
    return new if cache is None else cache.state.write(new, slots)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The state of a decoder that has read `lengths` tokens of each row."""

    lengths: Any
    """`Int[Array, "B"]`."""
    layers: list[list[LayerCache]]
    """Run -> block of its period."""
    encoded_segments: Any
    """`Int[Array, "B M"]`, 0 for the encoder's padding; None without an encoder."""
    max_length: int = field(metadata={"static": True})
    """Tokens a row for which there is room; the caller must not read more."""

    def positions(self, count: int) -> Int[Array, "B T"]:
        """Those of the next `count` tokens of each row."""
        positions = self.lengths[:, None] + jnp.arange(count)[None]
        # Only padding lies beyond the end, but a table of positions would give NaN there.
        return jnp.minimum(positions, self.max_length - 1)

    def repeat(self, count: int) -> "Cache":
        """Each row `count` times over, one after the other."""

        def again(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda x: jnp.repeat(x, count, axis=axis), tree)

        lengths, segments = again((self.lengths, self.encoded_segments), axis=0)
        return replace(self, lengths=lengths, layers=again(self.layers, axis=1), encoded_segments=segments)

    def select(self, beams: Int[Array, "B K"]) -> "Cache":
        """Of each K rows in a row, those that `beams` numbers; what the encoder read is the same for all of them."""

        def take(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda x: _take_rows(x, beams, axis), tree)

        layers = [[replace(layer, state=take(layer.state, axis=1)) for layer in scan] for scan in self.layers]
        return replace(self, lengths=take(self.lengths, axis=0), layers=layers)


def _take_rows(x: Array, beams: Int[Array, "B K"], axis: int) -> Array:
    """The rows that `beams` numbers within each group of K; groups lie whole on a device, so nothing is sent."""
    groups = x.reshape(*x.shape[:axis], *beams.shape, *x.shape[axis + 1 :])
    taken = jax.vmap(lambda group, index: jnp.take(group, index, axis=axis), (axis, 0), axis)(groups, beams)
    return taken.reshape(x.shape)
