"""Norm, embedding, feed-forward network, dropout and the initialisers they share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from switchjax.config import ModelConfig

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
    """A weight of variance `scale / fan_in`, where the first `num_inputs` dimensions are inputs."""
    inputs = tuple(range(num_inputs))
    outputs = tuple(range(num_inputs, len(shape)))
    init = jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs)
    return nnx.Param(init(key, shape, dtype), axes=axes)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Zeroes entries with probability `rate` and scales the others up; `x` itself without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def split_key(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray] | list[None]:
    """`count` keys; as many Nones for None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def _broadcast(vector: Array, like: Array) -> Array:
    """`vector` over the last axis of `like`, said and not left to rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`, in float32, without mean or bias (T5)."""

    def __init__(self, d_model: int, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(d_model, dtype), axes=("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        return (normed * _broadcast(self.scale[...].astype(jnp.float32), normed)).astype(x.dtype)


class Embedding(nnx.Module):
    """Token vectors [V, D]."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        self.config = config
        vectors = jax.random.normal(key, (config.vocab_size, config.d_model), config.param_dtype)
        self.vectors = nnx.Param(vectors, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return jnp.take(self.vectors[...].astype(self.config.dtype), tokens, axis=0)

    def logits(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """The tied output layer: similarity to each token's vector over sqrt(D)."""
        scaled = x * jnp.asarray(self.config.d_model**-0.5, x.dtype)
        return jnp.einsum("bld,vd->blv", scaled, self.vectors[...].astype(x.dtype))


class FeedForward(nnx.Module):
    """`act(x W_in) W_out`; the gated form multiplies `act(x W_gate)` by `x W_in` (GLU variants, Shazeer 2020).

    Applied to any leading axes; as an expert, to [N, D].
    """

    def __init__(self, config: ModelConfig, dropout: float, key: PRNGKeyArray):
        self.config, self.dropout = config, dropout
        gate_key, in_key, out_key = jax.random.split(key, 3)
        up, dtype = (config.d_model, config.d_ff), config.param_dtype
        _, gated = ACTIVATIONS[config.activation]
        self.w_in = kernel(in_key, up, ("embed", "mlp"), dtype)
        self.w_gate = kernel(gate_key, up, ("embed", "mlp"), dtype) if gated else None
        self.w_out = kernel(out_key, up[::-1], ("mlp", "embed"), dtype)

    def __call__(
        self, x: Float[Array, "*B D"], key: PRNGKeyArray | None, matmul: Callable[[Array, Array], Array] = jnp.matmul
    ) -> Float[Array, "*B D"]:
        """Applies the network.

        Args:
            x: inputs.
            key: for dropout; None in evaluation.
            matmul: how a weight is applied (stacked experts are given a grouped product, `switchjax.moe.ragged`).
        """
        activation, _ = ACTIVATIONS[self.config.activation]
        hidden = matmul(x, self.w_in[...].astype(x.dtype))
        if self.w_gate is None:
            hidden = activation(hidden)
        else:
            hidden = activation(matmul(x, self.w_gate[...].astype(x.dtype))) * hidden
        return matmul(dropout(hidden, self.dropout, key), self.w_out[...].astype(x.dtype))


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "geglu": (jax.nn.gelu, True),
}
"""Name -> (function, whether it gates a second matrix)."""
