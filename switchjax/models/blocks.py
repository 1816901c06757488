"""The layers that a stack is made of, one for each kind of `model.pattern`; all are called alike."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config, Layer, ModelConfig
from switchjax.models.attention import Attention
from switchjax.models.layers import FeedForward, dropout, make_norm, split_key
from switchjax.models.lstm import LSTM
from switchjax.models.switch_attention import SwitchAttention
from switchjax.moe.base_layer import BaseLayer
from switchjax.moe.layer import MoELayer, RoutingSums
from switchjax.moe.peer import PEERLayer
from switchjax.moe.shared import SharedMoELayer
from switchjax.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossInputs:
    """What the cross-attention of a decoder attends to."""

    encoded: Float[Array, "B M D"]
    mask: Bool[Array, "B 1 L M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackInputs:
    """What every layer of a stack sees besides the residual stream."""

    tokens: Int[Array, "B L"] | None
    """Vocabulary ids; None for images."""
    segments: Int[Array, "B L"]
    self_mask: Bool[Array, "B 1 L L"]
    self_bias: Float[Array, "1 H L L"] | None
    positions: Int[Array, "B L"] | None
    """By which queries and keys are rotated; None: they are not."""
    cross: CrossInputs | None

    @property
    def token_mask(self) -> Bool[Array, "B L"]:
        """False for padding."""
        return self.segments > 0


class Block(nnx.Module):
    """Self-attention, cross-attention in a decoder, and a feed-forward layer, each as `x + dropout(layer(norm(x)))`.

    The kind says which of them has experts; moe_dense adds a dense feed-forward layer at the end (ST-MoE).
    """

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        self_key, cross_key, ff_key = jax.random.split(key, 3)
        self.self_norm = make_norm(config.model)
        routed_attention = kind == "switch_attention"
        self.self_attention = (
            SwitchAttention(config, self_key) if routed_attention else Attention(config.model, self_key)
        )
        if cross:
            self.cross_norm = make_norm(config.model)
            self.cross_attention = Attention(config.model, cross_key)
        self.ff_norm = make_norm(config.model)
        self.ff = FEED_FORWARD[kind](config, ff_key)
        self.has_extra = kind == "moe_dense"
        if self.has_extra:
            self.extra_norm = make_norm(config.model)
            self.extra = _dense(config, jax.random.fold_in(ff_key, 0))

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        """The residual stream after the block, and the routing sums of each of its routers."""
        keys = iter(split_key(key, 8 if self.has_extra else 6))

        def residual(x: Array, y: Array) -> Array:
            y = x + dropout(y, self.config.dropout, next(keys))
            return constrain(y, "batch", "length", "embed")

        y, attention_sums = self._attend(self.self_norm(x), inputs, next(keys))
        x = residual(x, y)
        if inputs.cross is not None:
            encoded, mask = inputs.cross.encoded, inputs.cross.mask
            x = residual(x, self.cross_attention(self.cross_norm(x), encoded, mask, None, next(keys)))
        y, ff_sums = apply_feed_forward(self.ff, self.ff_norm(x), inputs, next(keys))
        x = residual(x, y)
        if self.has_extra:
            x = residual(x, self.extra(self.extra_norm(x), next(keys)))
        return x, attention_sums + ff_sums

    def _attend(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        if isinstance(self.self_attention, Attention):
            return self.self_attention(x, x, inputs.self_mask, inputs.self_bias, key, inputs.positions), []
        return self.self_attention(x, inputs.token_mask, inputs.self_mask, inputs.self_bias, key, inputs.tokens)


class BaseBlock(nnx.Module):
    """A BASE layer by itself, between two other blocks (Lewis et al. 2021)."""

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        del kind, cross
        self.layer = BaseLayer(_make_expert(config), config.model.d_model, config.moe, key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        """The residual stream after the layer, and its routing sums."""
        x, sums = self.layer(x, inputs.token_mask, key)
        return x, [sums]


class LSTMBlock(nnx.Module):
    """`x + dropout(LSTM(norm(x)))`."""

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        del kind, cross
        self.config = config.model
        self.norm = make_norm(config.model)
        self.lstm = LSTM(config.model, key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        """The residual stream after the layer."""
        y = self.lstm(self.norm(x), inputs.segments)
        return constrain(x + dropout(y, self.config.dropout, key), "batch", "length", "embed"), []


class BetweenBlock(nnx.Module):
    """`x + dropout(sigmoid(layer(norm(x))))`: a feed-forward layer or an MoE between two LSTM layers.

    It is applied to all time steps at once, which is what fills the experts' batches (Shazeer et al. 2017, section 3.1
    and appendix C.1).
    """

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        del cross
        self.config = config.model
        self.norm = make_norm(config.model)
        self.ff = FEED_FORWARD[kind](config, key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        """The residual stream after the layer, and its routing sums."""
        ff_key, dropout_key = split_key(key, 2)
        y, sums = apply_feed_forward(self.ff, self.norm(x), inputs, ff_key)
        y = dropout(jax.nn.sigmoid(y), self.config.dropout, dropout_key)
        return constrain(x + y, "batch", "length", "embed"), sums


FeedForwardLayer = FeedForward | MoELayer | SharedMoELayer | PEERLayer


def apply_feed_forward(
    layer: FeedForwardLayer, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
    """The layer's output, and its routing sums if it has experts."""
    if isinstance(layer, FeedForward):
        return layer(x, key), []
    if isinstance(layer, PEERLayer):
        y, sums = layer(x, inputs.token_mask, key)
    else:
        y, sums = layer(x, inputs.token_mask, key, inputs.tokens)
    return y, [sums]


def _dense(config: Config, key: PRNGKeyArray) -> FeedForward:
    return FeedForward(config.model, config.model.dropout, key)


def _moe(config: Config, key: PRNGKeyArray) -> MoELayer | SharedMoELayer:
    model, moe = config.model, config.moe
    if not moe.num_shared_experts:
        return MoELayer(_make_expert(config), model.d_model, moe, key, _vocab_size(model))
    routed_key, shared_key, mixing_key = jax.random.split(key, 3)
    # Experts that all tokens pass through add up to one network as wide as all of them.
    wide = dataclasses.replace(_expert_model(model), d_ff=model.d_ff * moe.num_shared_experts)
    shared = FeedForward(wide, model.dropout, shared_key)
    routed = MoELayer(_make_expert(config), model.d_model, moe, routed_key, _vocab_size(model))
    return SharedMoELayer(shared, routed, model.d_model, mixing_key)


def _peer(config: Config, key: PRNGKeyArray) -> PEERLayer:
    model, moe = config.model, config.moe
    return PEERLayer(
        model.d_model,
        moe.num_experts,
        moe.peer_heads,
        moe.num_selected_experts,
        moe.peer_query,
        key,
        model.param_dtype,
    )


def _make_expert(config: Config) -> Callable[[PRNGKeyArray], FeedForward]:
    return partial(FeedForward, _expert_model(config.model), config.moe.expert_dropout)


def _expert_model(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, activation=model.experts_activation)


def _vocab_size(model: ModelConfig) -> int:
    """For routers that go by token ids, which patches have not."""
    return 0 if model.family == "vision" else model.vocab_size


FEED_FORWARD: dict[str, Callable[[Config, PRNGKeyArray], FeedForwardLayer]] = {
    "dense": _dense,
    "dense_only": _dense,
    "switch_attention": _dense,
    "moe": _moe,
    "moe_dense": _moe,
    "moe_only": _moe,
    "peer": _peer,
}
"""Kind of layer -> its feed-forward network."""

AnyBlock = Block | BaseBlock | LSTMBlock | BetweenBlock
BLOCKS: dict[str, Callable[[Config, str, bool, PRNGKeyArray], AnyBlock]] = {
    "dense": Block,
    "moe": Block,
    "moe_dense": Block,
    "switch_attention": Block,
    "peer": Block,
    "base": BaseBlock,
    "lstm": LSTMBlock,
    "dense_only": BetweenBlock,
    "moe_only": BetweenBlock,
}
"""Kind of layer -> what it is built from."""


def make_block(config: Config, layer: Layer, cross: bool, key: PRNGKeyArray) -> AnyBlock:
    """The block of a layer, with as many experts as that layer has."""
    if layer.num_experts:
        moe = dataclasses.replace(config.moe, num_experts=layer.num_experts, experts_per_layer=())
        config = dataclasses.replace(config, moe=moe)
    return BLOCKS[layer.kind](config, layer.kind, cross, key)
