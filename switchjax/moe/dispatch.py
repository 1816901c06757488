"""Moving tokens into the experts' slots and back, as gathers in both directions of differentiation.

A slot holds at most one token and a token at most K slots, so each of the two moves is a gather and each is the other's
transpose: `gather_sum` with the two index arrays swapped. The papers' one-hot einsum is kept beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchjax.moe.gather import gather_sum
from switchjax.moe.routing import Routing


def dispatch_by_gather(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "E G C D"]:
    """Each slot's token; zeros in empty slots."""
    slot_row, token_row = _flat_indices(routing)
    groups, experts, capacity = routing.slot_token.shape
    rows = gather_sum(x.reshape(-1, x.shape[-1]), slot_row.reshape(-1, 1), token_row.reshape(-1, token_row.shape[-1]))
    return rows.reshape(experts, groups, capacity, -1)


def combine_by_gather(y: Float[Array, "E G C D"], routing: Routing) -> Float[Array, "G S D"]:
    """Each token's outputs, weighted by their gates and summed; zeros for a token without a slot."""
    slot_row, token_row = _flat_indices(routing)
    weighted = y * routing.slot_gate.swapaxes(0, 1)[..., None].astype(y.dtype)
    rows = gather_sum(
        weighted.reshape(-1, y.shape[-1]), token_row.reshape(-1, token_row.shape[-1]), slot_row.reshape(-1, 1)
    )
    return rows.reshape(*token_row.shape[:2], -1)


def _flat_indices(routing: Routing) -> tuple[Int[Array, "E G C"], Int[Array, "G S K"]]:
    """The row (of G * S tokens) in each slot, and the rows (of E * G * C slots) of each token; past the end: none."""
    groups, experts, capacity = routing.slot_token.shape
    tokens = routing.token_slot.shape[1]
    group = jnp.arange(groups)[:, None, None]
    slot_row = jnp.where(routing.slot_token < tokens, group * tokens + routing.slot_token, groups * tokens)
    expert, position = jnp.divmod(routing.token_slot, capacity)
    row = (expert * groups + group) * capacity + position
    token_row = jnp.where(expert < experts, row, experts * groups * capacity)
    return slot_row.swapaxes(0, 1), token_row


def dispatch_by_einsum(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "E G C D"]:
    """`dispatch_by_gather` as the papers write it, by a one-hot mask (G, E, C, S).

    A token that is not finite spreads to all slots of its group, 0 times infinity being NaN; the gather keeps it apart.
    """
    return jnp.einsum("gecs,gsd->egcd", _dispatch_mask(x, routing), x)


def combine_by_einsum(y: Float[Array, "E G C D"], routing: Routing) -> Float[Array, "G S D"]:
    """`combine_by_gather` as the papers write it: the mask times the gates."""
    gate = routing.slot_gate.astype(y.dtype)[..., None]
    return jnp.einsum("gecs,egcd->gsd", _dispatch_mask(y, routing) * gate, y)


def _dispatch_mask(x: Array, routing: Routing) -> Float[Array, "G E C S"]:
    return jax.nn.one_hot(routing.slot_token, routing.num_tokens, dtype=x.dtype)


@dataclass(frozen=True)
class Dispatcher:
    """The two moves of one form."""

    dispatch: Callable[[Array, Routing], Array]
    combine: Callable[[Array, Routing], Array]


DISPATCHERS = {
    "gather": Dispatcher(dispatch_by_gather, combine_by_gather),
    "einsum": Dispatcher(dispatch_by_einsum, combine_by_einsum),
}
