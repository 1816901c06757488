"""Norms, embedding, feed-forward network, dropout, and the initialisers that they share."""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from switchjax.config import ModelConfig
from switchjax.config.model import GATED
from switchjax.parallel.sharding import is_variable

M = TypeVar("M", bound=nnx.Module)

INIT_SCALE = 0.1
"""Truncated normal of variance 0.1 / fan_in (Switch Transformer, section 2.4)."""


def kernel(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
    num_inputs: int = 1,
    scale: float = INIT_SCALE,
) -> nnx.Param:
    """A weight of variance `scale / fan_in`, whose first `num_inputs` dimensions are inputs."""
    inputs = tuple(range(num_inputs))
    outputs = tuple(range(num_inputs, len(shape)))
    init = jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs)
    return nnx.Param(init(key, shape, dtype), axes=axes, cast=True)


def cast_kernels(model: M, dtype: DTypeLike) -> M:
    """`model` with every `kernel` in `dtype`, the dtype of its products."""
    # Cast before the loops over layers, so that these carry weights and gradients in `dtype`. With casts inside, XLA
    # moves the casts of all layers out of each loop and stacks gradients in the parameters' dtype: Switch-C then has
    # temporaries of 54 GB a chip instead of 23 on 256 TPU v5p chips.

    def cast(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable[...].astype(dtype)) if variable.get_metadata("cast", False) else variable

    return jax.tree.map(cast, model, is_leaf=is_variable)


def bias(config: ModelConfig, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param | None:
    """A bias that starts at zero; None if the model has no biases."""
    return nnx.Param(jnp.zeros(shape, config.param_dtype), axes=axes) if config.biases else None


def project(x: Float[Array, "..."], weight: Float[Array, "..."], num_inputs: int = 1) -> Float[Array, "..."]:
    """`x W`, the product over the last `num_inputs` axes of `x` and the first of the weight."""
    # A product of two matrices and not an einsum: the weight's gradient would sum over several axes of `x`, for which
    # XLA copies the incoming gradient into another order. On the CPU that takes a seventh of a small T5's step.
    inputs, outputs = weight.shape[:num_inputs], weight.shape[num_inputs:]
    rows = x.reshape(-1, math.prod(inputs)) @ weight.reshape(-1, math.prod(outputs))
    return rows.reshape(*x.shape[: x.ndim - num_inputs], *outputs)


def add_bias(x: Float[Array, "..."], vector: nnx.Param | None) -> Float[Array, "..."]:
    """`x + vector` over the last axes of `x`; `x` itself without a bias."""
    return x if vector is None else x + over_last_axes(vector[...].astype(x.dtype), x)


def over_last_axes(vector: Array, like: Array) -> Array:
    """`vector` reshaped to broadcast over the last axes of `like`, without rank promotion."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """`x` with entries set to 0 with probability `rate` and the others scaled up; `x` itself without a key."""
    # `nnx.Dropout` keeps its random state in the module; `lax.scan` and `jax.checkpoint` need the key as an argument.
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def split_key(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray] | list[None]:
    """`count` keys, or `count` times None without a key."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Norm(nnx.Module):
    """The norm that `model.norm` names, in float32.

    rms: `x / rms(x) * scale`, without mean or bias (T5). layer: `(x - mean) / deviation * scale + shift` (Ba et al.
    2016). none: `x`. Flax has a class for each; this one gives all three the same parameter names and sharding.
    """

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_epsilon
        size, dtype = config.d_model, config.param_dtype
        self.scale = None if config.norm == "none" else nnx.Param(jnp.ones(size, dtype), axes=("embed",))
        self.shift = nnx.Param(jnp.zeros(size, dtype), axes=("embed",)) if config.norm == "layer" else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.scale is None:
            return x
        wide = x.astype(jnp.float32)
        if self.shift is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scaled = normed * over_last_axes(self.scale[...].astype(jnp.float32), normed)
        return add_bias(scaled, self.shift).astype(x.dtype)


class Embedding(nnx.Module):
    """Token vectors [V, D]."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        self.config = config
        self.vectors = nnx.Param(normal(key, (config.vocab_size, config.d_model), config), axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return jnp.take(self.vectors[...].astype(self.config.dtype), tokens, axis=0)

    def logits(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """The tied output layer: products with all token vectors, divided by sqrt(D) in T5."""
        if self.config.scale_logits:
            x = x * jnp.asarray(self.config.d_model**-0.5, x.dtype)
        return project(x, self.vectors[...].T.astype(x.dtype))


def untied_output(config: ModelConfig, key: PRNGKeyArray) -> nnx.Param | None:
    """The output layer's weights [D, V]; None if it uses the token vectors."""
    if config.tie_embeddings:
        return None
    return kernel(key, (config.d_model, config.vocab_size), ("embed", "vocab"), config.param_dtype, scale=1.0)


def predict(x: Float[Array, "B L D"], embedding: Embedding, untied: nnx.Param | None) -> Float[Array, "B L V"]:
    """Logits of all tokens of the vocabulary, by `untied_output` or, without it, by the token vectors."""
    return embedding.logits(x) if untied is None else project(x, untied[...].astype(x.dtype))


def learned_positions(config: ModelConfig, count: int, key: PRNGKeyArray) -> nnx.Param | None:
    """A vector for each of `count` positions; None if the model does not learn them."""
    if config.positions != "learned":
        return None
    return nnx.Param(normal(key, (count, config.d_model), config), axes=(None, "embed"))


def normal(key: PRNGKeyArray, shape: tuple[int, ...], config: ModelConfig) -> Float[Array, "..."]:
    """Initial vectors of tokens or positions: normal, with deviation `model.embedding_stddev`."""
    stddev = jnp.asarray(config.embedding_stddev, config.param_dtype)
    return jax.random.normal(key, shape, config.param_dtype) * stddev


class FeedForward(nnx.Module):
    """`act(x W_in) W_out`; the gated form multiplies `act(x W_gate)` by `x W_in` (GLU variants, Shazeer 2020).

    With `model.biases`: `act(x W_in + b_in) W_out + b_out`.
    """

    def __init__(self, config: ModelConfig, dropout: float, key: PRNGKeyArray):
        self.config, self.dropout = config, dropout
        gate_key, in_key, out_key = jax.random.split(key, 3)
        up, dtype = (config.d_model, config.d_ff), config.param_dtype
        self.w_in = kernel(in_key, up, ("embed", "mlp"), dtype)
        self.w_gate = kernel(gate_key, up, ("embed", "mlp"), dtype) if config.activation in GATED else None
        self.w_out = kernel(out_key, up[::-1], ("mlp", "embed"), dtype)
        self.b_in = bias(config, (config.d_ff,), ("mlp",))
        self.b_out = bias(config, (config.d_model,), ("embed",))

    def __call__(
        self, x: Float[Array, "*B D"], key: PRNGKeyArray | None, matmul: Callable[[Array, Array], Array] = project
    ) -> Float[Array, "*B D"]:
        """Applies the network, with `matmul` for each weight; `switchjax.moe.ragged` passes a grouped product."""
        activation = ACTIVATIONS[self.config.activation]
        hidden = add_bias(matmul(x, self.w_in[...].astype(x.dtype)), self.b_in)
        if self.w_gate is None:
            hidden = activation(hidden)
        else:
            hidden = activation(matmul(x, self.w_gate[...].astype(x.dtype))) * hidden
        y = matmul(dropout(hidden, self.dropout, key), self.w_out[...].astype(x.dtype))
        if self.b_out is None:
            return y
        # A device of the axis `model` holds a slice of d_ff. The slices' outputs are added up, so each adds its share
        # of the bias.
        share = self.w_in.shape[-1] / self.config.d_ff
        return y + over_last_axes(self.b_out[...].astype(y.dtype), y) * jnp.asarray(share, y.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "geglu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
}
"""Name -> function; for gated activations, the function of the gate."""
