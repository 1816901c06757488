"""The choice of the next token: pure functions of logits and a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import DecodingConfig
from switchjax.data.vocabulary import PAD
from switchjax.parallel.sharding import partition_spec


def writable(logits: Float[Array, "*B V"], num_ids: int) -> Float[Array, "*B V"]:
    """float32 logits of what may be written: ids below `num_ids` (tables are larger than vocabularies) but for PAD."""
    ids = jnp.arange(logits.shape[-1])
    allowed = (ids < num_ids) & (ids != PAD)
    return jnp.where(jnp.broadcast_to(allowed, logits.shape), logits.astype(jnp.float32), -jnp.inf)


def choose(logits: Float[Array, "B V"], decoding: DecodingConfig, key: PRNGKeyArray) -> Int[Array, "B"]:
    """The most probable token of each row or, where `decoding.method` says so, one drawn at random.

    Temperature comes first, then top-k, then top-p of what that leaves.
    """
    if decoding.method == "greedy":
        return jnp.argmax(logits, axis=-1)
    logits = logits / decoding.temperature
    if decoding.top_k:
        logits = keep_top_k(logits, decoding.top_k)
    if decoding.top_p < 1:
        logits = keep_top_p(logits, decoding.top_p)
    return jax.random.categorical(key, logits, axis=-1)


def top_k(x: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`jax.lax.top_k` of each row; over a mesh in an island, as the partitioner would gather all rows for it."""

    def own_rows(x: Array) -> tuple[Array, Array]:
        values, index = jax.lax.top_k(x, k)
        return values, index

    if jax.sharding.get_abstract_mesh().empty:
        return own_rows(x)
    batch = partition_spec("batch")
    return jax.shard_map(own_rows, in_specs=batch, out_specs=(batch, batch))(x)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """-inf for all but the `k` highest logits, and what equals the last of them."""
    least = top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """-inf for all but the fewest most probable tokens of probability `p` in all, and what equals the last of them."""
    highest_first = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(highest_first, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < p  # what comes before has not yet probability p
    least = jnp.min(highest_first, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    return jnp.where(logits >= least, logits, -jnp.inf)
