"""The transformer stack: a repeating pattern of blocks, one period of which is the body of a `lax.scan`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.attention import Attention, RelativePositionBias, attention_mask
from switchjax.models.layers import FeedForward, RMSNorm, dropout, split_key
from switchjax.moe.layer import EXCHANGE, MoELayer, RoutingSums
from switchjax.parallel.sharding import constrain
from switchjax.parallel.stacking import stack

REMAT_POLICIES: dict[str, Callable] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "exchange": jax.checkpoint_policies.save_only_these_names(EXCHANGE),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossInputs:
    """What the cross-attention of a decoder attends to."""

    encoded: Float[Array, "B M D"]
    mask: Bool[Array, "B 1 L M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackInputs:
    """What every block of a stack sees besides the residual stream."""

    tokens: Int[Array, "B L"]
    token_mask: Bool[Array, "B L"]
    self_mask: Bool[Array, "B 1 L L"]
    self_bias: Float[Array, "1 H L L"]
    cross: CrossInputs | None


class Block(nnx.Module):
    """Self-attention, cross-attention in a decoder, and a dense or MoE feed-forward layer, each as
    `x + dropout(layer(norm(x)))`."""

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        d_model, dtype = config.model.d_model, config.model.param_dtype
        self_key, cross_key, ff_key = jax.random.split(key, 3)
        self.self_norm = RMSNorm(d_model, dtype)
        self.self_attention = Attention(config.model, self_key)
        if cross:
            self.cross_norm = RMSNorm(d_model, dtype)
            self.cross_attention = Attention(config.model, cross_key)
        self.ff_norm = RMSNorm(d_model, dtype)
        self.ff = _FEED_FORWARD[kind](config, ff_key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingSums | None]:
        keys = iter(split_key(key, 6))

        def residual(x: Array, y: Array) -> Array:
            y = x + dropout(y, self.config.dropout, next(keys))
            return constrain(y, "batch", "length", "embed")

        normed = self.self_norm(x)
        x = residual(x, self.self_attention(normed, normed, inputs.self_mask, inputs.self_bias, next(keys)))
        if inputs.cross is not None:
            encoded, mask = inputs.cross.encoded, inputs.cross.mask
            x = residual(x, self.cross_attention(self.cross_norm(x), encoded, mask, None, next(keys)))
        normed, sums = self.ff_norm(x), None
        if isinstance(self.ff, MoELayer):
            y, sums = self.ff(normed, inputs.token_mask, next(keys), inputs.tokens)
        else:
            y = self.ff(normed, next(keys))
        return residual(x, y), sums


def _dense(config: Config, key: PRNGKeyArray) -> FeedForward:
    return FeedForward(config.model, config.model.dropout, key)


def _moe(config: Config, key: PRNGKeyArray) -> MoELayer:
    make_expert = partial(FeedForward, config.model, config.moe.expert_dropout)
    return MoELayer(make_expert, config.model.d_model, config.moe, key, config.model.vocab_size)


_FEED_FORWARD: dict[str, Callable[[Config, PRNGKeyArray], nnx.Module]] = {"dense": _dense, "moe": _moe}


class Period(nnx.Module):
    """The blocks of one period of `model.pattern`."""

    def __init__(self, config: Config, cross: bool, key: PRNGKeyArray):
        keys = jax.random.split(key, len(config.model.pattern))
        blocks = [Block(config, kind, cross, k) for kind, k in zip(config.model.pattern, keys, strict=True)]
        self.blocks = nnx.List(blocks)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingSums | None]:
        """Applies the blocks; routing sums carry the period's MoE layers on their first axis, None without any."""
        layers = []
        for block, block_key in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            x, sums = block(x, inputs, block_key)
            layers += [] if sums is None else [sums]
        return x, jax.tree.map(lambda *values: jnp.stack(values), *layers) if layers else None


class Stack(nnx.Module):
    """An encoder (`causal=False, cross=False`) or a decoder: blocks, final norm and the relative position bias.

    Parameters are stacked over periods whether the loop is compiled as a loop or unrolled, so checkpoints do not depend
    on `model.scan_layers`.
    """

    def __init__(self, config: Config, num_layers: int, causal: bool, cross: bool, key: PRNGKeyArray):
        self.config, self.causal = config.model, causal
        self.num_periods = num_layers // len(config.model.pattern)
        bias_key, period_key = jax.random.split(key)
        self.bias = RelativePositionBias(config.model, not causal, bias_key)
        self.periods = stack(partial(Period, config, cross), jax.random.split(period_key, self.num_periods), "layer")
        self.norm = RMSNorm(config.model.d_model, config.model.param_dtype)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        key: PRNGKeyArray | None,
        cross: CrossInputs | None = None,
    ) -> tuple[Float[Array, "B L D"], RoutingSums | None]:
        """Applies all blocks.

        Args:
            x: embedded tokens.
            tokens: their ids, for routers that go by them.
            segments: the packed sequence that each token belongs to, 0 for padding.
            key: for dropout and routing noise; None in evaluation.
            cross: what the cross-attention of a decoder attends to.

        Returns:
            The normalised residual stream, and the routing sums of the MoE layers on a first axis (None without any).
        """
        inputs = StackInputs(
            tokens=tokens,
            token_mask=segments > 0,
            self_mask=attention_mask(segments, segments, self.causal),
            self_bias=self.bias(x.shape[1], x.shape[1]),
            cross=cross,
        )
        first_key, last_key, key = split_key(key, 3)
        keys = None if key is None else jax.random.split(key, self.num_periods)

        def body(x: Array, period: tuple[Period, PRNGKeyArray | None]) -> tuple[Array, RoutingSums | None]:
            module, key = period
            return module(x, inputs, key)

        if self.config.remat != "none":
            body = jax.checkpoint(
                body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not self.config.scan_layers
            )
        unroll = 1 if self.config.scan_layers else self.num_periods
        x = dropout(x, self.config.dropout, first_key)
        x, sums = jax.lax.scan(body, x, (self.periods, keys), unroll=unroll)
        sums = jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), sums)
        return dropout(self.norm(x), self.config.dropout, last_key), sums
