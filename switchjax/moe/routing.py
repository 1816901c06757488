"""The contract between routers and dispatchers: `Tokens` go into a router, a `Routing` comes out."""

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
    """The input of a router: the tokens of some groups, each of which is routed by itself."""

    x: Float[Array, "G S D"]
    """float32 whatever the model's dtype is; in training after jitter and dropout."""
    mask: Bool[Array, "G S"]
    """False for padding, which takes no slot and counts in no loss or metric."""
    capacity: int = field(metadata={"static": True})
    """C, slots of an expert for each group."""
    ids: Int[Array, "G S"] | None = None
    """Vocabulary ids, for routers that use them."""
    keys: Key[Array, "G"] | None = None
    """A key for each group, the same on every mesh; None in evaluation, where nothing is random."""

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
    """The output of a router: the token in each slot of the experts' buffers, and the weight of the slot's output.

    Losses, metrics and state sums are sums over the tokens of a group, so they add up over groups, devices and
    micro-batches. The objective and `switchjax.moe.losses.summarize` divide at the end.
    """

    slot_token: Int[Array, "G E C"]
    """The token in each slot, numbered within its group; S in an empty slot."""
    slot_gate: Float[Array, "G E C"]
    """Weight of the slot's output, differentiable; 0 in an empty slot."""
    token_slot: Int[Array, "G S K"] | None
    """The inverse: the K slots `e * C + c` of each token; E * C for a dropped choice. None if experts choose, because a
    token may then have any number of slots."""
    num_tokens: int = field(metadata={"static": True})
    """S, tokens in a group."""
    losses: dict[str, Float[Array, "G"]]
    """Losses by the names that `Router.losses` declares."""
    metrics: RoutingMetrics
    token_values: dict[str, Float[Array, "G S"]] = field(default_factory=dict)
    """Values of each token for `Router.reward_losses`."""
    state_sums: dict[str, Float[Array, "G ..."]] = field(default_factory=dict)
    """Sums for `Router.next_state`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingReport:
    """The losses and metrics of a layer with experts; in a stack, with a leading axis of layers."""

    losses: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    metrics: RoutingMetrics | None = None
    """None for a layer that makes no countable choices (PEER, soft MoE)."""
    token_values: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    """As in `Routing`, but of shape [B, L]."""
    state_sums: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    layers: tuple[int, ...] = field(default=(), metadata={"static": True})
    """Numbers of the stacked layers within their stack, from 0."""


Weights = Mapping[str, Float[Array, "..."]]
"""The weights of a router, by name."""


@dataclass(frozen=True)
class Weight:
    """A new weight of a router."""

    value: Float[Array, "..."]
    axes: tuple[str | None, ...]
    """Logical axes, named as in `switchjax.parallel.sharding`."""
    trained: bool = True
    """False for state, which only `Router.next_state` changes, not the optimiser."""


@dataclass(frozen=True)
class RouterSizes:
    """The sizes that decide the shapes of a router's weights."""

    d_model: int
    num_experts: int
    vocab_size: int = 0
    """0 if tokens have no vocabulary ids."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a router that has none."""


def linear_router(sizes: RouterSizes, options: Any, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r [D, E], for `logits = x W_r`.

    N(0, 0.02) as in the released Switch Transformer, but cut at two deviations, which makes the deviation 0.0176. With
    the scale 1 / fan_in of other weights, the router of a narrow model would drop more tokens at first.
    """
    init = jax.nn.initializers.truncated_normal(0.02)
    return {"logits": Weight(init(key, (sizes.d_model, sizes.num_experts), jnp.float32), ("embed", None))}


BALANCE: Mapping[str, float] = {"load_balance_loss": 0.01, "router_z_loss": 0.0}
"""The losses of every router in which tokens choose, with their default weights."""

RewardLosses = Callable[[Mapping[str, Array], Float[Array, "B L"], Bool[Array, "B L"]], dict[str, Array]]
"""(`Routing.token_values` of N layers [N, B, L], rewards, mask) -> sums over tokens [N] by the loss's name."""


@dataclass(frozen=True)
class Router:
    """A routing system: its equation and everything that belongs to it."""

    route: Callable[[Weights, Tokens, MoEConfig, Any], Routing]
    """The equation: (weights, tokens, the section `moe`, the router's options) -> routing."""
    weights: Callable[[RouterSizes, Any, PRNGKeyArray], dict[str, Weight]] = linear_router
    """Creates the weights from the sizes, the router's options and a key."""
    options: type = NoOptions
    """A frozen dataclass; `moe.options` sets its fields, and an unknown option is refused."""
    losses: Mapping[str, float] = field(default_factory=lambda: BALANCE)
    """Each loss that the router returns, with its default weight; `moe.loss_weights` replaces weights."""
    next_state: Callable[[Weights, Mapping[str, Array], Any], dict[str, Array]] | None = None
    """(weights, the step's `Routing.state_sums` over groups, devices and micro-batches, options) -> new values of the
    weights that are not trained."""
    reward_losses: RewardLosses | None = None
    """Losses that depend on how well the model predicts each token."""
    selected: tuple[int, ...] | None = None
    """The allowed numbers of selected experts, K; None: any."""
    noncausal: str | None = None
    """The reason why a token's experts depend on later tokens even in evaluation; None if they do not."""
    check: Callable[[MoEConfig, Any], None] | None = None
    """Raises a `UserError` for settings that the router does not support."""
