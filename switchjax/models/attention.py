"""Multi-head attention with T5's relative position bias."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import ModelConfig
from switchjax.models.layers import INIT_SCALE, dropout, kernel


def attention_mask(
    query_segments: Int[Array, "B Q"], key_segments: Int[Array, "B L"], causal: bool = False
) -> Bool[Array, "B 1 Q L"]:
    """Which keys each query sees: those of its own segment and, where causal, not those after it.

    Padding is segment 0; its queries see padding only, and their outputs are of no account.
    """
    mask = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))[None]
    return mask[:, None]


class RelativePositionBias(nnx.Module):
    """A learned bias for each head and bucket of distances (T5, section 2.1), shared by the layers of a stack."""

    def __init__(self, config: ModelConfig, bidirectional: bool, key: PRNGKeyArray):
        self.config, self.bidirectional = config, bidirectional
        shape = (config.num_heads, config.relative_buckets)
        # As in T5: the scores see the bias as it is, so it starts as large as theirs.
        bias = jax.random.normal(key, shape, config.param_dtype) * jnp.asarray(config.d_model**-0.5, config.param_dtype)
        self.bias = nnx.Param(bias, axes=("heads", "bucket"))

    def __call__(self, num_queries: int, num_keys: int) -> Float[Array, "1 H Q L"]:
        distance = jnp.arange(num_keys)[None, :] - jnp.arange(num_queries)[:, None]
        buckets = relative_position_bucket(
            distance, self.bidirectional, self.config.relative_buckets, self.config.relative_max_distance
        )
        return self.bias[...].astype(jnp.float32)[:, buckets][None]


def relative_position_bucket(
    distance: Int[Array, "Q L"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "Q L"]:
    """The bucket of `key position - query position`.

    Half of the buckets are for exact distances, the others grow logarithmically up to `max_distance` and the last one
    holds all beyond. Bidirectional: half of them for keys after the query. Otherwise keys after the query count as 0.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


class Attention(nnx.Module):
    """Multi-head attention without biases or 1/sqrt(d) (T5 folds it into the queries' initialisation)."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        self.config = config
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        inward, axes = (config.d_model, config.num_heads, config.d_head), ("embed", "heads", "head")
        outward, dtype = (*inward[1:], config.d_model), config.param_dtype
        self.query = kernel(query_key, inward, axes, dtype, scale=INIT_SCALE / config.d_head)
        self.key = kernel(key_key, inward, axes, dtype)
        self.value = kernel(value_key, inward, axes, dtype)
        self.out = kernel(out_key, outward, (*axes[1:], "embed"), dtype, num_inputs=2)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        context: Float[Array, "B L D"],
        mask: Bool[Array, "B 1 Q L"],
        bias: Float[Array, "1 H Q L"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B Q D"]:
        """Attends from `x` to `context` (the same array for self-attention).

        Args:
            x: queries.
            context: keys and values.
            mask: which keys each query sees.
            bias: added to the scores before the softmax, which is in float32.
            key: for dropout of the attention weights; None in evaluation.
        """
        query = jnp.einsum("bqd,dha->bqha", x, self.query[...].astype(x.dtype))
        keys = jnp.einsum("bld,dha->blha", context, self.key[...].astype(x.dtype))
        values = jnp.einsum("bld,dha->blha", context, self.value[...].astype(x.dtype))
        mixed = attend(query, keys, values, mask, bias, self.config.dropout, key)
        return jnp.einsum("bqha,had->bqd", mixed, self.out[...].astype(x.dtype))


def attend(
    query: Float[Array, "B Q H A"],
    keys: Float[Array, "B L H A"],
    values: Float[Array, "B L H A"],
    mask: Bool[Array, "B 1 Q L"],
    bias: Float[Array, "1 H Q L"] | None,
    rate: float,
    key: PRNGKeyArray | None,
) -> Float[Array, "B Q H A"]:
    """`softmax(q k + bias) v` with the softmax in float32, and dropout of its weights at `rate`."""
    scores = jnp.einsum("bqha,blha->bhql", query, keys, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(query.dtype)
    return jnp.einsum("bhql,blha->bqha", dropout(weights, rate, key), values)
