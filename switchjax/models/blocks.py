"""The blocks of a stack; `switchjax.config.layers.KINDS` defines what each kind of layer consists of."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import KINDS, Config, Layer, LayerKind, ModelConfig
from switchjax.models.attention import Attention
from switchjax.models.cache import KeyValues, LayerCache, State
from switchjax.models.inputs import StackInputs
from switchjax.models.layers import FeedForward, Norm, dropout, split_key
from switchjax.models.lstm import LSTM
from switchjax.models.switch_attention import SwitchAttention
from switchjax.moe.base_layer import BaseLayer
from switchjax.moe.layer import MoELayer
from switchjax.moe.peer import PEERLayer
from switchjax.moe.routing import RoutingReport
from switchjax.moe.shared import SharedMoELayer
from switchjax.moe.soft import SoftMoELayer
from switchjax.parallel.sharding import constrain


class FeedForwardLayer(Protocol):
    """The feed-forward network of a block: dense, or with experts."""

    def __call__(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RoutingReport | None]:
        """The output for each token, and a report if there are experts."""


class BlockOutput(NamedTuple):
    """The result of a block."""

    x: Float[Array, "B L D"]
    """The residual stream after the block."""
    reports: dict[str, RoutingReport]
    """Reports by the names of the block's layers with experts."""
    state: State = None
    """The cache's new state; None without a cache."""


class Block(nnx.Module):
    """Self-attention, cross-attention in a decoder, and a feed-forward layer, each as `x + dropout(layer(norm(x)))`.

    A kind with `extra_dense` has a dense feed-forward layer at the end (ST-MoE).
    """

    def __init__(self, config: Config, kind: LayerKind, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        self_key, cross_key, ff_key = jax.random.split(key, 3)
        self.self_norm = Norm(config.model)
        self.self_attention = (
            SwitchAttention(config, self_key) if kind.routed_attention else Attention(config.model, self_key)
        )
        if cross:
            self.cross_norm = Norm(config.model)
            self.cross_attention = Attention(config.model, cross_key)
        self.ff_norm = Norm(config.model)
        self.ff = FEED_FORWARDS[kind.feed_forward](config, ff_key)
        self.has_extra = kind.extra_dense
        if self.has_extra:
            self.extra_norm = Norm(config.model)
            self.extra = DenseLayer(config.model, config.model.dropout, jax.random.fold_in(ff_key, 0))

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """The cache before the first token."""
        model = self.config
        state = KeyValues.empty(rows, length, model.kv_heads, model.d_head, model.dtype)
        return LayerCache(state, None if encoded is None else self.cross_attention.keys_values(encoded))

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Applies the block to the residual stream."""
        keys = iter(split_key(key, 8 if self.has_extra else 6))

        def residual(x: Array, y: Array) -> Array:
            y = x + dropout(y, self.config.dropout, next(keys))
            return constrain(y, "batch", "length", "embed")

        y, routers, state = self.self_attention.attend_to_itself(self.self_norm(x), inputs, next(keys), cache)
        reports = {f"self_attention/{name}": report for name, report in routers.items()}
        x = residual(x, y)
        if inputs.cross is not None:
            context = self.cross_attention.keys_values(inputs.cross.encoded) if cache is None else cache.cross
            x = residual(x, self.cross_attention(self.cross_norm(x), context, inputs.cross.mask, None, next(keys)))
        y, report = self.ff(self.ff_norm(x), inputs.token_mask, next(keys), inputs.tokens)
        x = residual(x, y)
        if self.has_extra:
            x = residual(x, self.extra(self.extra_norm(x), inputs.token_mask, next(keys))[0])
        return BlockOutput(x, reports | named("ff", report), state)


def named(name: str, report: RoutingReport | None) -> dict[str, RoutingReport]:
    """The report under its layer's name, if there is one."""
    return {} if report is None else {name: report}


class Stateless:
    """A block that processes each token by itself, so it needs no cache in decoding."""

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """An empty cache."""
        return LayerCache()


class NormedExpert(Norm):
    """`expert(norm(x))`, the expert of a BASE layer; 0 at first, since the expert's last weights `w_out` start at 0.

    Subclasses Norm so that checkpoints say `experts/scale`, not `experts/norm/scale`.
    """

    def __init__(self, make_expert: Callable[[PRNGKeyArray], Any], config: ModelConfig, key: PRNGKeyArray):
        super().__init__(config)
        self.expert = make_expert(key)
        self.expert.w_out[...] = jnp.zeros_like(self.expert.w_out[...])

    def __call__(self, x: Float[Array, "N D"], key: PRNGKeyArray | None = None) -> Float[Array, "N D"]:
        """Applies norm and expert; the key is for dropout."""
        return self.expert(super().__call__(x), key)


class BaseBlock(Stateless, nnx.Module):
    """A BASE layer by itself, between two other blocks (Lewis et al. 2021)."""

    def __init__(self, config: Config, kind: LayerKind, cross: bool, key: PRNGKeyArray):
        make_expert = partial(NormedExpert, _make_expert(config), config.model)
        self.layer = BaseLayer(make_expert, config.model.d_model, config.moe, key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Applies the layer to the residual stream."""
        x, report = self.layer(x, inputs.token_mask, key)
        return BlockOutput(x, named("layer", report))


class LSTMBlock(nnx.Module):
    """`x + dropout(LSTM(norm(x)))`."""

    def __init__(self, config: Config, kind: LayerKind, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        self.norm = Norm(config.model)
        self.lstm = LSTM(config.model, key)

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> LayerCache:
        """The cache before the first token."""
        return LayerCache(self.lstm.empty(rows, self.config.dtype))

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Applies the block to the residual stream."""
        x_normed, state = self.norm(x), None
        if cache is None:
            y = self.lstm(x_normed, inputs.segments)
        else:
            y, state = self.lstm.extend(x_normed, inputs.token_mask, cache.state)
        return BlockOutput(constrain(x + dropout(y, self.config.dropout, key), "batch", "length", "embed"), {}, state)


class BetweenBlock(Stateless, nnx.Module):
    """`x + dropout(sigmoid(layer(norm(x))))`: a feed-forward layer or an MoE between two LSTM layers.

    It processes all time steps at once, which makes the experts' batches large (Shazeer et al. 2017, section 3.1 and
    appendix C.1).
    """

    def __init__(self, config: Config, kind: LayerKind, cross: bool, key: PRNGKeyArray):
        self.config = config.model
        self.norm = Norm(config.model)
        self.ff = FEED_FORWARDS[kind.feed_forward](config, key)

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Applies the block to the residual stream."""
        ff_key, dropout_key = split_key(key, 2)
        y, report = self.ff(self.norm(x), inputs.token_mask, ff_key, inputs.tokens)
        y = dropout(jax.nn.sigmoid(y), self.config.dropout, dropout_key)
        return BlockOutput(constrain(x + y, "batch", "length", "embed"), named("ff", report))


class DenseLayer(FeedForward):
    """A feed-forward network that is called like layers with experts.

    Subclasses FeedForward so that checkpoints say `ff/w_in`, not `ff/network/w_in`.
    """

    def __call__(  # type: ignore[override]  # called like FeedForwardLayer, no longer like FeedForward
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], None]:
        """The network's output; no report."""
        return super().__call__(x, key), None


def _moe(config: Config, key: PRNGKeyArray) -> MoELayer | SharedMoELayer:
    model, moe = config.model, config.moe
    vocab_size = 0 if model.family == "vision" else model.vocab_size  # patches have no ids
    if not moe.num_shared_experts:
        return MoELayer(_make_expert(config), model.d_model, moe, key, vocab_size)
    routed_key, shared_key, mixing_key = jax.random.split(key, 3)
    # Experts that all tokens pass through equal one network as wide as all of them together.
    wide = dataclasses.replace(_expert_model(model), d_ff=model.d_ff * moe.num_shared_experts)
    shared = FeedForward(wide, model.dropout, shared_key)
    routed = MoELayer(_make_expert(config), model.d_model, moe, routed_key, vocab_size)
    return SharedMoELayer(shared, routed, model.d_model, mixing_key)


def _make_expert(config: Config) -> Callable[[PRNGKeyArray], FeedForward]:
    return partial(FeedForward, _expert_model(config.model), config.moe.expert_dropout)


def _expert_model(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, activation=model.experts_activation)


FEED_FORWARDS: Mapping[str, Callable[[Config, PRNGKeyArray], FeedForwardLayer]] = {
    "dense": lambda config, key: DenseLayer(config.model, config.model.dropout, key),
    "moe": _moe,
    "peer": lambda config, key: PEERLayer(config.model.d_model, config.moe, key, config.model.param_dtype),
    "soft": lambda config, key: SoftMoELayer(_make_expert(config), config.model.d_model, config.moe, key),
}

AnyBlock = Block | BaseBlock | LSTMBlock | BetweenBlock
BLOCKS: Mapping[str, Callable[[Config, LayerKind, bool, PRNGKeyArray], AnyBlock]] = {
    "transformer": Block,
    "base": BaseBlock,
    "lstm": LSTMBlock,
    "between": BetweenBlock,
}


def make_block(config: Config, layer: Layer, cross: bool, key: PRNGKeyArray) -> AnyBlock:
    """The block of a layer, with that layer's number of experts."""
    if layer.num_experts:
        moe = dataclasses.replace(config.moe, num_experts=layer.num_experts, experts_per_layer=())
        config = dataclasses.replace(config, moe=moe)
    kind = KINDS[layer.kind]
    return BLOCKS[kind.block](config, kind, cross, key)
