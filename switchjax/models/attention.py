"""Multi-head attention: grouped heads, T5's relative position bias, rotary positions."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from switchjax.config import ModelConfig
from switchjax.models.cache import KeyValues, LayerCache, seen
from switchjax.models.inputs import StackInputs
from switchjax.models.layers import INIT_SCALE, add_bias, bias, dropout, kernel, project
from switchjax.moe.routing import RoutingReport


def attention_mask(
    query_segments: Int[Array, "B Q"], key_segments: Int[Array, "B L"], causal: bool = False, window: int = 0
) -> Bool[Array, "B 1 Q L"]:
    """True where a query sees a key: of its own segment and, if causal, not later than itself.

    Padding is segment 0; its queries see padding only, and their outputs are not used. If causal, a query sees at most
    `window` keys, its own included; 0: all.
    """
    mask = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))[None]
        if window:
            mask &= jnp.triu(jnp.ones(mask.shape[1:], bool), 1 - window)[None]
    return mask[:, None]


def cached_mask(positions: Int[Array, "B Q"], num_keys: int, window: int = 0) -> Bool[Array, "B 1 Q L"]:
    """True where a query at one of these positions sees a key of the cache: its own and earlier ones.

    At most `window` keys, its own included; 0: all.
    """
    # Slots of the cache that are not written yet lie after every query, so the same comparison hides them.
    distance = positions[:, :, None] - jnp.arange(num_keys)[None, None]
    mask = distance >= 0
    return (mask & (distance < window) if window else mask)[:, None]


def positions_in_segments(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0, 1, 2, ... within each packed sequence."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def sinusoids(count: int, width: int) -> Float[Array, "L D"]:
    """A vector per position: sines, then cosines, of `position / 10000^(2 i / D)` (Vaswani et al. 2017)."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = jnp.arange(count, dtype=jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rotate(x: Float[Array, "B L H A"], positions: Int[Array, "B L"], base: float) -> Float[Array, "B L H A"]:
    """Rotary position embedding (Su et al. 2021): turns pairs (i, i + A / 2) by `position * base^(-2 i / A)`.

    The product of a rotated query and a rotated key then depends only on the distance between them.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class RelativePositionBias(nnx.Module):
    """A learned bias for each head and bucket of distances (T5, section 2.1), shared by the layers of a stack."""

    def __init__(self, config: ModelConfig, bidirectional: bool, key: PRNGKeyArray):
        self.config, self.bidirectional = config, bidirectional
        shape = (config.num_heads, config.relative_buckets)
        # As in T5: the bias is added to unscaled scores, so it starts at their size.
        bias = jax.random.normal(key, shape, config.param_dtype) * jnp.asarray(config.d_model**-0.5, config.param_dtype)
        self.bias = nnx.Param(bias, axes=("heads", "bucket"))

    def __call__(self, positions: Int[Array, "B Q"], num_keys: int) -> Float[Array, "B H Q L"]:
        """The bias of queries at `positions` towards keys 0, 1, 2, ..."""
        distance = jnp.arange(num_keys)[None, None] - positions[:, :, None]
        buckets = relative_position_bucket(
            distance, self.bidirectional, self.config.relative_buckets, self.config.relative_max_distance
        )
        return self.bias[...].astype(jnp.float32)[:, buckets].swapaxes(0, 1)


def relative_position_bucket(
    distance: Int[Array, "*B Q L"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*B Q L"]:
    """The bucket of `key position - query position`.

    Half of the buckets hold one distance each. The others grow logarithmically up to `max_distance`, and the last one
    holds all larger distances. If bidirectional, half of all buckets are for keys after the query; otherwise such keys
    have distance 0.
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
    """Multi-head attention; scores are divided by sqrt(d_head) if `model.scale_scores`.

    If `model.num_kv_heads` is less than `num_heads`, groups of query heads share a head of keys and values (Ainslie et
    al. 2023).
    """

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        self.config = config
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        axes, dtype = ("embed", "heads", "head"), config.param_dtype
        heads, shared = (config.num_heads, config.d_head), (config.kv_heads, config.d_head)
        query_scale = INIT_SCALE if config.scale_scores else INIT_SCALE / config.d_head
        self.query = kernel(query_key, (config.d_model, *heads), axes, dtype, scale=query_scale)
        self.key = kernel(key_key, (config.d_model, *shared), axes, dtype)
        self.value = kernel(value_key, (config.d_model, *shared), axes, dtype)
        self.out = kernel(out_key, (*heads, config.d_model), (*axes[1:], "embed"), dtype, num_inputs=2)
        self.query_bias = bias(config, heads, axes[1:])
        self.key_bias = bias(config, shared, axes[1:])
        self.value_bias = bias(config, shared, axes[1:])
        self.out_bias = bias(config, (config.d_model,), ("embed",))

    def keys_values(self, context: Float[Array, "B L D"], positions: Int[Array, "B L"] | None = None) -> KeyValues:
        """The keys and values of `context`; keys are rotated by `positions` if given."""
        keys = add_bias(project(context, self.key[...].astype(context.dtype)), self.key_bias)
        values = add_bias(project(context, self.value[...].astype(context.dtype)), self.value_bias)
        return KeyValues(keys if positions is None else rotate(keys, positions, self.config.rotary_base), values)

    def attend_to_itself(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None
    ) -> tuple[Float[Array, "B L D"], dict[str, RoutingReport], KeyValues | None]:
        """Self-attention of a block: the output, no reports, and the cache's new state if there is a cache."""
        context = seen(self.keys_values(x, inputs.positions), cache, inputs.slots)
        y = self(x, context, inputs.self_mask, inputs.self_bias, key, inputs.positions)
        return y, {}, None if cache is None else context

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        context: KeyValues,
        mask: Bool[Array, "B 1 Q L"],
        bias: Float[Array, "#B H Q L"] | None,
        key: PRNGKeyArray | None,
        positions: Int[Array, "B Q"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Attends from `x` to the `keys_values` in `context`; queries are rotated by `positions` if given."""
        query = add_bias(project(x, self.query[...].astype(x.dtype)), self.query_bias)
        if positions is not None:
            query = rotate(query, positions, self.config.rotary_base)
        if self.config.scale_scores:
            query = query * jnp.asarray(self.config.d_head**-0.5, query.dtype)
        recomputed = self.config.remat != "none"
        mixed = attend(query, context.keys, context.values, mask, bias, self.config.dropout, key, recomputed)
        return add_bias(project(mixed, self.out[...].astype(x.dtype), num_inputs=2), self.out_bias)


def attend(
    query: Float[Array, "B Q H A"],
    keys: Float[Array, "B L N A"],
    values: Float[Array, "B L N A"],
    mask: Bool[Array, "B 1 Q L"],
    bias: Float[Array, "#B H Q L"] | None,
    rate: float,
    key: PRNGKeyArray | None,
    recomputed: bool = False,
) -> Float[Array, "B Q H A"]:
    """`softmax(q k + bias) v` with the softmax in float32, and dropout of its weights at `rate`.

    Each of the N heads of keys and values serves H / N consecutive query heads. `recomputed` is True if the backward
    pass computes all this again, so that nothing needs to be kept for it.
    """
    if _fits_cudnn(query, keys) and (key is None or not rate):
        return _attend_by_cudnn(query, keys, values, mask, bias)
    rows, queries, heads, _ = query.shape
    grouped = query.reshape(rows, queries, keys.shape[2], -1, query.shape[-1])
    scores = jnp.einsum("bqnga,blna->bngql", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, queries, -1)
    if bias is not None:
        scores += _over_rows(bias, rows) if bias.shape[0] == 1 else bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # `_softmax` keeps its result for the backward pass, which only costs memory if that computes everything again.
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype) if recomputed else _softmax(scores, query.dtype)
    weights = dropout(weights, rate, key).reshape(rows, keys.shape[2], -1, queries, keys.shape[1])
    return jnp.einsum("bngql,blna->bqnga", weights, values).reshape(query.shape)


def _fits_cudnn(query: Float[Array, "B Q H A"], keys: Float[Array, "B L N A"]) -> bool:
    """True if the devices have cuDNN, and it has forward and backward kernels for such queries and keys."""
    device, (_, queries, _, width) = jax.devices()[0], query.shape
    if device.platform != "gpu" or not device.device_kind.startswith("NVIDIA") or float(device.compute_capability) < 8:
        return False
    even = queries % 2 == 0 and keys.shape[1] % 2 == 0
    return even and width % 8 == 0 and width <= 128 and query.dtype in (jnp.bfloat16, jnp.float16)


def _attend_by_cudnn(
    query: Float[Array, "B Q H A"],
    keys: Float[Array, "B L N A"],
    values: Float[Array, "B L N A"],
    mask: Bool[Array, "B 1 Q L"],
    bias: Float[Array, "#B H Q L"] | None,
) -> Float[Array, "B Q H A"]:
    """`attend` by a kernel that writes no scores to memory; the bias is in the model's dtype."""
    if bias is not None:
        # Broadcast in float32 first, so that the bias's gradient is summed over rows in float32.
        bias = jnp.broadcast_to(bias, (query.shape[0], *bias.shape[1:])).astype(query.dtype)
    return jax.nn.dot_product_attention(query, keys, values, bias, mask, scale=1.0, implementation="cudnn")


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(scores: Float[Array, "B H Q L"], dtype: DTypeLike) -> Float[Array, "B H Q L"]:
    """Softmax over the last axis, computed in float32 and returned in `dtype`."""
    # By hand, so that only the result is kept for the backward pass. JAX keeps the float32 weights in addition to those
    # in bfloat16: three times the memory of the largest arrays of a T5.
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _softmax_backward(dtype: DTypeLike, weights: Array, gradient: Array) -> tuple[Array]:
    wide, towards = weights.astype(jnp.float32), gradient.astype(jnp.float32)
    return (wide * (towards - jnp.sum(towards * wide, axis=-1, keepdims=True)),)


_softmax.defvjp(lambda scores, dtype: (_softmax(scores, dtype),) * 2, _softmax_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _over_rows(bias: Float[Array, "1 H Q L"], rows: int) -> Float[Array, "B H Q L"]:
    """The same `bias` for each row."""
    return jnp.broadcast_to(bias, (rows, *bias.shape[1:]))


def _over_rows_backward(rows: int, _: None, gradient: Array) -> tuple[Array]:
    # A product with ones: on the CPU, XLA's sum over rows takes many times as long.
    ones = jnp.ones((1, rows), gradient.dtype)
    return (jnp.einsum("rb,bhql->rhql", ones, gradient, precision=jax.lax.Precision.HIGHEST),)


_over_rows.defvjp(lambda bias, rows: (_over_rows(bias, rows), None), _over_rows_backward)
