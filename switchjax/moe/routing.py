"""The contract between routers and dispatchers: what a router sees, what it decides, and what a router is."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.losses import RoutingMetrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What a router sees: the tokens of some groups, each group by itself."""

    x: Float[Array, "G S D"]
    """float32 whatever the model's dtype; in training with jitter or dropout on it."""
    mask: Bool[Array, "G S"]
    """False for padding, which takes no slot and counts nowhere."""
    capacity: int = field(metadata={"static": True})
    """C, slots of an expert for a group."""
    ids: Int[Array, "G S"] | None = None
    """Vocabulary ids, for routers that go by them."""
    keys: Key[Array, "G"] | None = None
    """A key a group, the same on every mesh; None in evaluation, where nothing is random."""

    @property
    def training(self) -> bool:
        """True in training; only then is anything random."""
        return self.keys is not None

    def random(self, purpose: str, draw: Callable[[PRNGKeyArray], Array]) -> Array:
        """`draw(key)` for each group, stacked; each purpose has its own stream of keys."""
        assert self.keys is not None, "evaluation is deterministic"
        number = zlib.crc32(purpose.encode()) & 0x7FFFFFFF
        return jax.vmap(lambda key: draw(jax.random.fold_in(key, number)))(self.keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which token fills each slot of the experts' buffers, and with which weight its output returns.

    Losses, metrics and state sums are sums over the tokens of a group, so that they add up over groups, devices and
    micro-batches; the objective and `switchjax.moe.losses.summarize` divide at the end.
    """

    slot_token: Int[Array, "G E C"]
    """Token of the group in each slot; S where the slot is empty."""
    slot_gate: Float[Array, "G E C"]
    """Weight of the slot's output (differentiable); 0 where the slot is empty."""
    token_slot: Int[Array, "G S K"] | None
    """The inverse: slots `e * C + c` of each token; E * C where a choice was dropped. None where experts choose,
    because a token may then have any number of slots."""
    num_tokens: int = field(metadata={"static": True})
    """S, tokens of a group."""
    losses: dict[str, Float[Array, "G"]]
    """By the names that `Router.losses` declares."""
    metrics: RoutingMetrics
    token_values: dict[str, Float[Array, "G S"]] = field(default_factory=dict)
    """What `Router.reward_losses` needs to know of each token."""
    state_sums: dict[str, Float[Array, "G ..."]] = field(default_factory=dict)
    """What `Router.next_state` needs to know of the step."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingReport:
    """What a layer with experts returns beside its output; with a leading axis of layers where these are stacked."""

    losses: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    metrics: RoutingMetrics | None = None
    """None for a layer without choices to count (PEER, soft MoE)."""
    token_values: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    """As in `Routing`, but [B, L]."""
    state_sums: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    layers: tuple[int, ...] = field(default=(), metadata={"static": True})
    """Numbers of the stacked layers in their stack, from 0."""


Weights = Mapping[str, Float[Array, "..."]]
"""The weights of a router, by name."""


@dataclass(frozen=True)
class Weight:
    """A weight of a router as it is created."""

    value: Float[Array, "..."]
    axes: tuple[str | None, ...]
    """Logical axes, as `switchjax.parallel.sharding` names them."""
    trained: bool = True
    """False for state, which the optimiser leaves alone and `Router.next_state` may move."""


@dataclass(frozen=True)
class RouterSizes:
    """What the shapes of a router's weights follow from."""

    d_model: int
    num_experts: int
    vocab_size: int = 0
    """0 where tokens have no vocabulary ids."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a router that has none."""


def linear_router(sizes: RouterSizes, options: Any, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r [D, E], for `logits = x W_r`.

    N(0, 0.02) as the Switch Transformer was released, but cut at two deviations, which leaves one of 0.0176; scaled by
    fan_in like other weights, a narrow model's router drops more tokens at first.
    """
    init = jax.nn.initializers.truncated_normal(0.02)
    return {"logits": Weight(init(key, (sizes.d_model, sizes.num_experts), jnp.float32), ("embed", None))}


BALANCE: Mapping[str, float] = {"load_balance_loss": 0.01, "router_z_loss": 0.0}
"""The losses of every router in which tokens choose, with their default weights."""


RewardLosses = Callable[[Mapping[str, Array], Float[Array, "B L"], Bool[Array, "B L"]], dict[str, Array]]
"""From `Routing.token_values` of N layers [N, B, L], the reward of each token and its mask, to sums over tokens [N] by
the names that `Router.losses` declares."""


@dataclass(frozen=True)
class Router:
    """A routing system: its equation, and all that belongs to it."""

    route: Callable[[Weights, Tokens, MoEConfig, Any], Routing]
    """The equation: weights, tokens, the section `moe`, and the router's own options -> routing."""
    weights: Callable[[RouterSizes, Any, PRNGKeyArray], dict[str, Weight]] = linear_router
    """Creates the weights, given the router's options and a key."""
    options: type = NoOptions
    """A frozen dataclass; `moe.options` sets its fields and is checked against it."""
    losses: Mapping[str, float] = field(default_factory=lambda: BALANCE)
    """Every loss that the router returns, with its default weight; `moe.loss_weights` replaces weights."""
    next_state: Callable[[Weights, Mapping[str, Array], Any], dict[str, Array]] | None = None
    """The weights that are not trained, as they are after a step: from the weights, the step's `Routing.state_sums`,
    added up over groups, devices and micro-batches, and the options."""
    reward_losses: RewardLosses | None = None
    """Losses that need to know how well the model predicted."""
    selected: tuple[int, ...] | None = None
    """The K that it knows; None: any."""
    noncausal: str | None = None
    """Why a token's experts depend, in evaluation too, on tokens after it; None: they do not."""
    check: Callable[[MoEConfig, Any], None] | None = None
    """Raises a `UserError` for a section `moe` and options that it cannot route by."""


def router_logits(x: Float[Array, "G S D"], weight: Float[Array, "D N"]) -> Float[Array, "G S N"]:
    """`x W` in full float32, because the matrix units of accelerators would round the logits."""
    return jnp.einsum("gsd,dn->gsn", x, weight, precision=jax.lax.Precision.HIGHEST)


def select_experts(tokens: Tokens, config: MoEConfig, scores: Float[Array, "G S E"]) -> Int[Array, "G S K"]:
    """The K experts of the highest scores; the first among equals comes first.

    With `moe.sample_experts`, in training, K experts drawn without replacement from the softmax of the scores: the
    highest after Gumbel noise.
    """
    if config.sample_experts and tokens.training:
        scores = scores + tokens.random("sample", lambda key: jax.random.gumbel(key, scores.shape[1:]))
    if config.num_selected_experts == 1:
        return jnp.argmax(scores, axis=-1, keepdims=True)
    return jax.lax.top_k(scores, config.num_selected_experts)[1]


def values_of_chosen(values: Float[Array, "G S E"], expert_index: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """`values` of the chosen experts."""
    # A masked sum, because the derivative of a gather would be a scatter.
    chosen = jax.nn.one_hot(expert_index, values.shape[-1], dtype=bool)
    return jnp.sum(values[..., None, :], axis=-1, where=chosen)


def normalize_over_chosen(values: Float[Array, "G S E"], expert_index: Int[Array, "G S K"]) -> Float[Array, "G S E"]:
    """`values` over the sum of those of the chosen experts."""
    return values / jnp.sum(values_of_chosen(values, expert_index), axis=-1, keepdims=True)


def is_chosen(expert_index: Int[Array, "G S K"], num_experts: int) -> Bool[Array, "G S E"]:
    """True for the experts among the chosen."""
    return jnp.any(jax.nn.one_hot(expert_index, num_experts, dtype=bool), axis=2)


def jitter(x: Float[Array, "G S D"], noise: float, keys: Key[Array, "G"]) -> Float[Array, "G S D"]:
    """`x` times uniform noise in [1 - noise, 1 + noise], one key a group: the same on every mesh.

    The released Switch code multiplies the router's input; the paper's pseudo-code adds to the logits.
    """

    def factors(key: PRNGKeyArray) -> Array:
        return jax.random.uniform(key, x.shape[1:], x.dtype, minval=1 - noise, maxval=1 + noise)

    return x * jax.vmap(factors)(keys)
