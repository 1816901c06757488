"""The contract between routers and dispatchers: what a router sees (`Tokens`) and what it decides (`Routing`)."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.gather import gather_sum


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What a router sees: the tokens of some groups, none of which knows of the others."""

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
        """Whether this is training: only then is anything random."""
        return self.keys is not None

    def random(self, purpose: str, draw: Callable[[PRNGKeyArray], Array]) -> Array:
        """`draw(key)` for each group, stacked: a stream of its own for each purpose."""
        assert self.keys is not None, "evaluation is deterministic"
        number = zlib.crc32(purpose.encode()) & 0x7FFFFFFF
        return jax.vmap(lambda key: draw(jax.random.fold_in(key, number)))(self.keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which token fills each slot of the experts' buffers, and with which weight its output returns.

    `losses` and `metrics` are sums over a group's tokens, so that they add up over groups, devices and micro-batches;
    `switchjax.moe.losses.summarize` divides at the end.
    """

    slot_token: Int[Array, "G E C"]
    """Token of the group in each slot; S where the slot is empty."""
    slot_gate: Float[Array, "G E C"]
    """Weight of the slot's output (differentiable); 0 where the slot is empty."""
    token_slot: Int[Array, "G S K"] | None
    """The inverse: slots `e * C + c` of each token; E * C where a choice was dropped. None where experts choose, as
    a token may then have any number of slots."""
    num_tokens: int = field(metadata={"static": True})
    """S, tokens of a group."""
    losses: dict[str, Float[Array, "G"]]
    metrics: dict[str, Float[Array, "G *E"]]
    token_values: dict[str, Float[Array, "G S"]] = field(default_factory=dict)
    """What a loss outside of the layer needs to know of each token (reinforced routing)."""


Weights = Mapping[str, Float[Array, "..."]]
"""The weights of a router, by name."""


@dataclass(frozen=True)
class Weight:
    """A weight of a router as it is created."""

    value: Float[Array, "..."]
    axes: tuple[str | None, ...]
    """Logical axes, as `switchjax.parallel.sharding` names them."""
    update: str = "gradient"
    """How training changes it; see `switchjax.training.optimizer`."""


@dataclass(frozen=True)
class RouterSizes:
    """What the shapes of a router's weights follow from."""

    d_model: int
    num_experts: int
    num_expert_groups: int = 1
    vocab_size: int = 0


def linear_router(sizes: RouterSizes, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r [D, E], for `logits = x W_r`.

    N(0, 0.02) as the Switch Transformer was released, but cut at two deviations, which leaves one of 0.0176; scaled by
    fan_in like other weights, a narrow model's router drops more tokens at first.
    """
    init = jax.nn.initializers.truncated_normal(0.02)
    return {"logits": Weight(init(key, (sizes.d_model, sizes.num_experts), jnp.float32), ("embed", None))}


@dataclass(frozen=True)
class Router:
    """A routing system: a function of tokens, and what it needs to know of it before it runs."""

    route: Callable[[Weights, Tokens, MoEConfig], Routing]
    weights: Callable[[RouterSizes, PRNGKeyArray], dict[str, Weight]] = linear_router
    selected: tuple[int, ...] | None = None
    """The K that it knows; None: any."""
    noncausal: str | None = None
    """Why a token's experts depend, in evaluation too, on tokens after it; None: they do not."""
    check: Callable[[MoEConfig], None] | None = None
    """Raises a `UserError` for a config that it cannot route by."""


def project(x: Float[Array, "G S D"], weight: Float[Array, "D N"]) -> Float[Array, "G S N"]:
    """`x W` in full float32: the matrix units of accelerators would round the logits otherwise."""
    return jnp.einsum("gsd,dn->gsn", x, weight, precision=jax.lax.Precision.HIGHEST)


def jitter(x: Float[Array, "G S D"], noise: float, keys: Key[Array, "G"]) -> Float[Array, "G S D"]:
    """`x` times uniform noise in [1 - noise, 1 + noise], one key a group: the same on every mesh.

    The released Switch code multiplies the router's input; the paper's pseudo-code adds to the logits.
    """
    factors = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, minval=1 - noise, maxval=1 + noise))(
        keys
    )
    return x * factors


def gates_of_slots(
    gate: Float[Array, "G S K"], slot_choice: Int[Array, "G E C"], choice_slot: Int[Array, "G S K"]
) -> Float[Array, "G E C"]:
    """The gate of the choice in each slot, 0 where the slot is empty; differentiable in `gate`.

    Args:
        gate: the weight of each choice.
        slot_choice: as `fill_slots` returns it, choices counted as `k * S + s`.
        choice_slot: its inverse.
    """

    def one_group(gate: Array, slot_choice: Array, choice_slot: Array) -> Array:
        rows = gate.T.reshape(-1, 1)
        return gather_sum(rows, slot_choice.reshape(-1, 1), choice_slot.T.reshape(-1, 1)).reshape(slot_choice.shape)

    return jax.vmap(one_group)(gate, slot_choice, choice_slot)
