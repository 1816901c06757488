"""What every router returns, and the routers: pure functions from logits to a `Routing`.

To add a router, write a function of the type `Router` and enter it in `ROUTERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from switchjax.moe.gather import gather_sum
from switchjax.moe.losses import load_balance_loss, router_z_loss, routing_metrics
from switchjax.moe.slots import fill_slots


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
    token_slot: Int[Array, "G S K"]
    """The inverse: slots `e * C + c` of each token; E * C where a choice was dropped."""
    losses: dict[str, Float[Array, "G"]]
    metrics: dict[str, Float[Array, "G *E"]]

    @property
    def num_tokens(self) -> int:
        """S, tokens of a group."""
        return self.token_slot.shape[1]


Router = Callable[[Float[Array, "G S E"], Bool[Array, "G S"], int], Routing]


def jitter(x: Float[Array, "G S D"], noise: float, keys: Key[Array, "G"]) -> Float[Array, "G S D"]:
    """`x` times uniform noise in [1 - noise, 1 + noise], one key a group: the same on every mesh.

    The released Switch code multiplies the router's input; the paper's pseudo-code adds to the logits.
    """
    factors = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, minval=1 - noise, maxval=1 + noise))(
        keys
    )
    return x * factors


def route_switch(logits: Float[Array, "G S E"], token_mask: Bool[Array, "G S"], capacity: int) -> Routing:
    """Switch Transformer's top-1 routing (section 2.1): `y = p_e(x) E_e(x)`, e the argmax of `p = softmax(logits)`.

    The gate multiplies although there is one expert only: through it the router gets the language model's gradient.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = jnp.argmax(probs, axis=-1, keepdims=True)
    # A masked sum and not a gather, whose derivative would be a scatter.
    chosen = jax.nn.one_hot(expert_index[..., 0], probs.shape[-1], dtype=bool)
    gate = jnp.sum(probs, axis=-1, keepdims=True, where=chosen)
    return token_choice(logits, probs, gate, expert_index, token_mask, capacity)


def token_choice(
    logits: Float[Array, "G S E"],
    router_probs: Float[Array, "G S E"],
    gate: Float[Array, "G S K"],
    expert_index: Int[Array, "G S K"],
    token_mask: Bool[Array, "G S"],
    capacity: int,
) -> Routing:
    """The routing in which each token goes to the experts it selected, as far as their buffers reach."""
    num_experts, tokens = logits.shape[-1], logits.shape[1]
    slot_choice, choice_slot = fill_slots(expert_index, token_mask, num_experts, capacity)
    empty = slot_choice == expert_index.shape[-1] * tokens
    return Routing(
        slot_token=jnp.where(empty, tokens, slot_choice % tokens),
        slot_gate=gates_of_slots(gate, slot_choice, choice_slot),
        token_slot=choice_slot,
        losses={
            "load_balance_loss": load_balance_loss(router_probs, expert_index, token_mask),
            "router_z_loss": router_z_loss(logits, token_mask),
        },
        metrics=routing_metrics(router_probs, expert_index, token_mask, jnp.sum(~empty, axis=(1, 2))),
    )


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


ROUTERS: dict[str, Router] = {"switch": route_switch}
