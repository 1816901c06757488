"""Chooses the next token: pure functions of logits and a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import DecodingConfig
from switchjax.data.vocabulary import PAD
from switchjax.parallel.sharding import partition_spec


def mask_invalid_ids(logits: Float[Array, "*B V"], num_ids: int) -> Float[Array, "*B V"]:
    """float32 logits with -inf for PAD and for ids from `num_ids` on, which only fill up the embedding table."""
    ids = jnp.arange(logits.shape[-1])
    allowed = (ids < num_ids) & (ids != PAD)
    return jnp.where(jnp.broadcast_to(allowed, logits.shape), logits.astype(jnp.float32), -jnp.inf)


def choose(logits: Float[Array, "B V"], decoding: DecodingConfig, key: PRNGKeyArray) -> Int[Array, "B"]:
    """Chooses each row's most probable token, or draws one at random if `decoding.method` is "sample".

    Applies the temperature first, then top-k, then top-p to the remaining tokens.
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
    """`jax.lax.top_k` of each row, without communication between the rows' devices."""

    def own_rows(x: Array) -> tuple[Array, Array]:
        values, index = jax.lax.top_k(x, k)
        return values, index

    if jax.sharding.get_abstract_mesh().empty:
        return own_rows(x)
    # A shard_map, because XLA's partitioner would gather all rows onto each device for top_k.
    batch = partition_spec("batch")
    return jax.shard_map(own_rows, in_specs=batch, out_specs=(batch, batch))(x)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Sets all but the `k` highest logits (and those equal to the lowest of them) to -inf."""
    least = top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Sets logits to -inf outside the smallest set of tokens with total probability `p` (and equals of its lowest)."""
    highest_first = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(highest_first, axis=-1)
    # A token stays while those before it sum to less than p: the token that reaches p is kept too, so one always stays.
    kept = jnp.cumsum(probs, axis=-1) - probs < p
    # A threshold on the logits avoids a scatter back into the original order.
    least = jnp.min(highest_first, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    return jnp.where(logits >= least, logits, -jnp.inf)
