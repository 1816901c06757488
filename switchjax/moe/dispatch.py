"""Moves tokens into the experts' slots and back, by gathers in the forward and in the backward pass.

A slot holds at most one token and a token has at most K slots. So both moves are gathers, and each is the transpose of
the other: `gather_sum` with the two index arrays swapped. Where experts choose, a token may have any number of slots,
and combine is a scatter-add. The papers' one-hot einsum is the other choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchjax.moe.gather_sum import gather_sum
from switchjax.moe.routing import Routing


def dispatch_by_gather(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "E G C D"]:
    """Each slot's token; zeros in empty slots."""
    groups, experts, capacity = routing.slot_token.shape
    slot_row, tokens = _token_rows(routing).reshape(-1), x.reshape(-1, x.shape[-1])
    if routing.token_slot is None:  # experts choose
        rows = jnp.take(tokens, slot_row, axis=0, mode="fill", fill_value=0)
    else:
        rows = gather_sum(tokens, slot_row[:, None], _slot_rows(routing, routing.token_slot))
    return rows.reshape(experts, groups, capacity, -1)


def combine_by_gather(y: Float[Array, "E G C D"], routing: Routing) -> Float[Array, "G S D"]:
    """Each token's outputs, weighted by their gates and summed; zeros for a token without a slot."""
    slot_row, groups = _token_rows(routing).reshape(-1), y.shape[1]
    # An einsum, because on the CPU its gradient for the gates (a sum of products) is 30 times as fast as of `y * gate`.
    weighted = jnp.einsum("egcd,gec->egcd", y, routing.slot_gate.astype(y.dtype)).reshape(-1, y.shape[-1])
    if routing.token_slot is None:
        rows = jnp.zeros((groups * routing.num_tokens, y.shape[-1]), y.dtype).at[slot_row].add(weighted, mode="drop")
    else:
        rows = gather_sum(weighted, _slot_rows(routing, routing.token_slot), slot_row[:, None])
    return rows.reshape(groups, routing.num_tokens, -1)


def _token_rows(routing: Routing) -> Int[Array, "E G C"]:
    """The row, of G * S tokens, that fills each slot; G * S in an empty slot."""
    groups, tokens = routing.slot_token.shape[0], routing.num_tokens
    group = jnp.arange(groups)[:, None, None]
    rows = jnp.where(routing.slot_token < tokens, group * tokens + routing.slot_token, groups * tokens)
    return rows.swapaxes(0, 1)


def _slot_rows(routing: Routing, token_slot: Int[Array, "G S K"]) -> Int[Array, "T K"]:
    """The K rows, of E * G * C slots, of each of the T = G * S tokens; E * G * C for a dropped choice."""
    groups, experts, capacity = routing.slot_token.shape
    group = jnp.arange(groups)[:, None, None]
    expert, position = jnp.divmod(token_slot, capacity)
    row = (expert * groups + group) * capacity + position
    return jnp.where(expert < experts, row, experts * groups * capacity).reshape(-1, token_slot.shape[-1])


def dispatch_by_einsum(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "E G C D"]:
    """`dispatch_by_gather` as the papers write it, with a one-hot mask [G, E, C, S].

    A token that is not finite spreads to all slots of its group, since 0 times infinity is NaN; by gather it does not.
    """
    return jnp.einsum("gecs,gsd->egcd", _dispatch_mask(x, routing), x)


def combine_by_einsum(y: Float[Array, "E G C D"], routing: Routing) -> Float[Array, "G S D"]:
    """`combine_by_gather` as the papers write it, with the mask times the gates."""
    gate = routing.slot_gate.astype(y.dtype)[..., None]
    return jnp.einsum("gecs,egcd->gsd", _dispatch_mask(y, routing) * gate, y)


def _dispatch_mask(x: Array, routing: Routing) -> Float[Array, "G E C S"]:
    return jax.nn.one_hot(routing.slot_token, routing.num_tokens, dtype=x.dtype)


@dataclass(frozen=True)
class Dispatcher:
    """The two moves in one form."""

    dispatch: Callable[[Array, Routing], Array]
    combine: Callable[[Array, Routing], Array]


DISPATCHERS = {
    "gather": Dispatcher(dispatch_by_gather, combine_by_gather),
    "einsum": Dispatcher(dispatch_by_einsum, combine_by_einsum),
}
