"""The layers that a stack is made of, one for each kind of `model.pattern`; all are called alike."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.config import Config, Layer, ModelConfig
from switchjax.models.attention import Attention
from switchjax.models.cache import KeyValues, LayerCache, State
from switchjax.models.inputs import StackInputs
from switchjax.models.layers import FeedForward, Norm, dropout, split_key
from switchjax.models.lstm import LSTM
from switchjax.models.switch_attention import SwitchAttention
from switchjax.moe.base_layer import BaseLayer
from switchjax.moe.layer import MoELayer, RoutingSums
from switchjax.moe.peer import PEERLayer
from switchjax.moe.shared import SharedMoELayer
from switchjax.parallel.sharding import constrain


class Block(nnx.Module):
    """Self-attention, cross-attention in a decoder, and a feed-forward layer, each as `x + dropout(layer(norm(x)))`.

    The kind says which of them has experts; moe_dense adds a dense feed-forward layer at the end (ST-MoE).
    """

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        self_key, cross_key, ff_key = jax.random.split(key, 3)
        self.self_norm = Norm(config.model)
        routed_attention = kind == "switch_attention"
        self.self_attention = (
            SwitchAttention(config, self_key) if routed_attention else Attention(config.model, self_key)
        )
        if cross:
            self.cross_norm = Norm(config.model)
            self.cross_attention = Attention(config.model, cross_key)
        self.ff_norm = Norm(config.model)
        self.ff = FEED_FORWARD[kind](config, ff_key)
        self.has_extra = kind == "moe_dense"
        if self.has_extra:
            self.extra_norm = Norm(config.model)
            self.extra = _dense(config, jax.random.fold_in(ff_key, 0))

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """The cache before the first token."""
        model = self.config
        state = KeyValues.empty(rows, length, model.kv_heads, model.d_head, model.dtype)
        return LayerCache(state, None if encoded is None else self.cross_attention.keys_values(encoded))

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums], State]:
        """The residual stream after the block, the routing sums of each of its routers, and the cache's new state."""
        keys = iter(split_key(key, 8 if self.has_extra else 6))

        def residual(x: Array, y: Array) -> Array:
            y = x + dropout(y, self.config.dropout, next(keys))
            return constrain(y, "batch", "length", "embed")

        y, attention_sums, state = self._attend(self.self_norm(x), inputs, next(keys), cache)
        x = residual(x, y)
        if inputs.cross is not None:
            context = self.cross_attention.keys_values(inputs.cross.encoded) if cache is None else cache.cross
            x = residual(x, self.cross_attention(self.cross_norm(x), context, inputs.cross.mask, None, next(keys)))
        y, ff_sums = apply_feed_forward(self.ff, self.ff_norm(x), inputs, next(keys))
        x = residual(x, y)
        if self.has_extra:
            x = residual(x, self.extra(self.extra_norm(x), next(keys)))
        return x, attention_sums + ff_sums, state

    def _attend(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums], State]:
        def seen(new: KeyValues) -> KeyValues:
            return new if cache is None else cache.state.write(new, inputs.slots)

        layer, mask, bias = self.self_attention, inputs.self_mask, inputs.self_bias
        if isinstance(layer, Attention):
            context = seen(layer.keys_values(x, inputs.positions))
            y, sums = layer(x, context, mask, bias, key, inputs.positions), []
        else:
            new, value_sums = layer.keys_values(x, inputs.token_mask, key, inputs.tokens)
            context = seen(new)
            y, query_sums = layer(x, context, inputs.token_mask, mask, bias, key, inputs.tokens)
            sums = [query_sums, value_sums]
        return y, sums, None if cache is None else context


class NormedExpert(Norm):
    """`expert(norm(x))`, 0 at first: what a BASE layer adds.

    A norm, not a module that has one: the norm's weights are the expert's own in the names that checkpoints know.

    Args:
        make_expert: makes the expert from a key: a module as `MoELayer` takes it, with a parameter `w_out`, its last.
        config: says which norm.
        key: for the expert.
    """

    def __init__(self, make_expert: Callable[[PRNGKeyArray], Any], config: ModelConfig, key: PRNGKeyArray):
        super().__init__(config)
        self.expert = make_expert(key)
        self.expert.w_out[...] = jnp.zeros_like(self.expert.w_out[...])

    def __call__(self, x: Float[Array, "N D"], key: PRNGKeyArray | None = None) -> Float[Array, "N D"]:
        """Applies norm and expert; the key is for dropout."""
        return self.expert(super().__call__(x), key)


class BaseBlock(nnx.Module):
    """A BASE layer by itself, between two other blocks (Lewis et al. 2021)."""

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        del kind, cross
        make_expert = partial(NormedExpert, _make_expert(config), config.model)
        self.layer = BaseLayer(make_expert, config.model.d_model, config.moe, key)

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """Nothing: the layer looks at one token at a time."""
        del rows, length, encoded
        return LayerCache()

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums], State]:
        """The residual stream after the layer, and its routing sums."""
        x, sums = self.layer(x, inputs.token_mask, key)
        return x, [sums], None


class LSTMBlock(nnx.Module):
    """`x + dropout(LSTM(norm(x)))`."""

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        del kind, cross
        self.config = config.model
        self.norm = Norm(config.model)
        self.lstm = LSTM(config.model, key)

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """The cache before the first token."""
        del length, encoded
        return LayerCache(self.lstm.empty(rows, self.config.dtype))

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums], State]:
        """The residual stream after the layer, and the cache's new state."""
        x_normed, state = self.norm(x), None
        if cache is None:
            y = self.lstm(x_normed, inputs.segments)
        else:
            y, state = self.lstm.extend(x_normed, inputs.token_mask, cache.state)
        return constrain(x + dropout(y, self.config.dropout, key), "batch", "length", "embed"), [], state


class BetweenBlock(nnx.Module):
    """`x + dropout(sigmoid(layer(norm(x))))`: a feed-forward layer or an MoE between two LSTM layers.

    It is applied to all time steps at once, which is what fills the experts' batches (Shazeer et al. 2017, section 3.1
    and appendix C.1).
    """

    def __init__(self, config: Config, kind: str, cross: bool, key: PRNGKeyArray):
        del cross
        self.config = config.model
        self.norm = Norm(config.model)
        self.ff = FEED_FORWARD[kind](config, key)

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """Nothing: the layer looks at one token at a time."""
        del rows, length, encoded
        return LayerCache()

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums], State]:
        """The residual stream after the layer, and its routing sums."""
        ff_key, dropout_key = split_key(key, 2)
        y, sums = apply_feed_forward(self.ff, self.norm(x), inputs, ff_key)
        y = dropout(jax.nn.sigmoid(y), self.config.dropout, dropout_key)
        return constrain(x + y, "batch", "length", "embed"), sums, None


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
