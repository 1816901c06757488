"""The transformer stack: a repeating pattern of blocks, one period of which is the body of a `lax.scan`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config, UserError
from switchjax.models.attention import Attention, RelativePositionBias, attention_mask
from switchjax.models.layers import FeedForward, RMSNorm, dropout, split_key
from switchjax.models.switch_attention import SwitchAttention
from switchjax.moe.exchange import EXCHANGE
from switchjax.moe.layer import MoELayer, RoutingSums, noncausal_because
from switchjax.moe.routers import ROUTERS
from switchjax.moe.shared import SharedMoELayer
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
    """Self-attention, cross-attention in a decoder, and a feed-forward layer, each as `x + dropout(layer(norm(x)))`.

    `kind` says which of them has experts; see `ModelConfig.pattern`.
    """

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        d_model, dtype = config.model.d_model, config.model.param_dtype
        self_key, cross_key, ff_key = jax.random.split(key, 3)
        self.self_norm = RMSNorm(d_model, dtype)
        routed_attention = kind == "switch_attention"
        self.self_attention = (
            SwitchAttention(config, self_key) if routed_attention else Attention(config.model, self_key)
        )
        if cross:
            self.cross_norm = RMSNorm(d_model, dtype)
            self.cross_attention = Attention(config.model, cross_key)
        self.ff_norm = RMSNorm(d_model, dtype)
        self.ff = _moe(config, ff_key) if kind == "moe" else _dense(config, ff_key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        """The residual stream after the block, and the routing sums of each of its routers."""
        keys = iter(split_key(key, 6))

        def residual(x: Array, y: Array) -> Array:
            y = x + dropout(y, self.config.dropout, next(keys))
            return constrain(y, "batch", "length", "embed")

        y, attention_sums = self._attend(self.self_norm(x), inputs, next(keys))
        x = residual(x, y)
        if inputs.cross is not None:
            encoded, mask = inputs.cross.encoded, inputs.cross.mask
            x = residual(x, self.cross_attention(self.cross_norm(x), encoded, mask, None, next(keys)))
        y, ff_sums = self._feed_forward(self.ff_norm(x), inputs, next(keys))
        return residual(x, y), attention_sums + ff_sums

    def _attend(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        if isinstance(self.self_attention, Attention):
            return self.self_attention(x, x, inputs.self_mask, inputs.self_bias, key), []
        return self.self_attention(x, inputs.token_mask, inputs.self_mask, inputs.self_bias, key, inputs.tokens)

    def _feed_forward(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        if isinstance(self.ff, FeedForward):
            return self.ff(x, key), []
        y, sums = self.ff(x, inputs.token_mask, key, inputs.tokens)
        return y, [sums]


def _dense(config: Config, key: PRNGKeyArray) -> FeedForward:
    return FeedForward(config.model, config.model.dropout, key)


def _moe(config: Config, key: PRNGKeyArray) -> MoELayer | SharedMoELayer:
    model, moe = config.model, config.moe
    routed_key, shared_key, mixing_key = jax.random.split(key, 3)
    make_expert = partial(FeedForward, model, moe.expert_dropout)
    if not moe.num_shared_experts:
        return MoELayer(make_expert, model.d_model, moe, key, model.vocab_size)
    # Experts that all tokens pass through add up to one network as wide as all of them.
    wide = dataclasses.replace(model, d_ff=model.d_ff * moe.num_shared_experts)
    shared = FeedForward(wide, model.dropout, shared_key)
    routed = MoELayer(make_expert, model.d_model, moe, routed_key, model.vocab_size)
    return SharedMoELayer(shared, routed, model.d_model, mixing_key)


def check_causal(config: Config) -> None:
    """Refuses, for a decoder, routers that let what comes after a token change its experts.

    Raises:
        UserError: saying why, and what to set.
    """
    if not config.model.has_experts or config.moe.allow_noncausal_routing:
        return
    if (reason := noncausal_because(config.moe)) is not None:
        raise UserError(
            f"moe.router={config.moe.router} would let a decoder see the future: {reason}; "
            "moe.allow_noncausal_routing=True asks for it by name"
            + (
                ""
                if ROUTERS[config.moe.router].noncausal
                else ", moe.fill_order=token_by_token or moe.dropless=True avoids it"
            )
        )


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
        layers: list[RoutingSums] = []
        for block, block_key in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            x, sums = block(x, inputs, block_key)
            layers += sums
        return x, jax.tree.map(lambda *values: jnp.stack(values), *layers) if layers else None


class Stack(nnx.Module):
    """An encoder (`causal=False, cross=False`) or a decoder: blocks, final norm and the relative position bias.

    Parameters are stacked over periods whether the loop is compiled as a loop or unrolled, so checkpoints do not depend
    on `model.scan_layers`.
    """

    def __init__(self, config: Config, num_layers: int, causal: bool, cross: bool, key: PRNGKeyArray):
        if causal:
            check_causal(config)
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
