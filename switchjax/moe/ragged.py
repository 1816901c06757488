"""Dropless experts as grouped matrix products: rows sorted by expert, every expert's matrices on its run of rows.

No slot is empty and no buffer has a limit (MegaBlocks, Gale et al. 2022). It pays where `jax.lax.ragged_dot` has a
kernel of its own, on TPU and GPU; the CPU computes every expert on every row.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from switchjax.moe.gather import gather_sum
from switchjax.moe.routing import Routing


def apply_ragged(experts: Any, x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "G S M"]:
    """What dispatch, experts and combine give where capacity is the group.

    Args:
        experts: stacked on their first axis, called as `experts(rows, None, matmul)`.
        x: tokens.
        routing: with `token_slot`, of a router in which tokens choose.
    """
    assert routing.token_slot is not None, "rows are sorted by the experts that tokens choose"
    groups, num_experts, capacity = routing.slot_token.shape
    selected = routing.token_slot.shape[-1]
    expert = (routing.token_slot // capacity).reshape(-1)  # E: padding, or a choice given up
    rows = expert.shape[0]
    order = jnp.argsort(expert, stable=True)
    place = jnp.where(expert < num_experts, jnp.argsort(order), rows)
    token = jnp.where(expert[order] < num_experts, order // selected, rows // selected)
    sizes = jnp.sum(jax.nn.one_hot(expert, num_experts, dtype=jnp.int32), axis=0)

    lined_up = gather_sum(x.reshape(-1, x.shape[-1]), token[:, None], place.reshape(-1, selected))
    y = experts(lined_up, None, partial(jax.lax.ragged_dot, group_sizes=sizes))
    offset = jnp.arange(groups)[:, None, None] * (num_experts * capacity)
    slot = jnp.where(routing.token_slot < num_experts * capacity, offset + routing.token_slot, routing.slot_gate.size)
    gate = jnp.take(routing.slot_gate.reshape(-1), slot.reshape(-1)[order], mode="fill", fill_value=0)
    weighted = y * gate[:, None].astype(y.dtype)
    out = gather_sum(weighted, place.reshape(-1, selected), token[:, None])
    return out.reshape(*x.shape[:2], -1)
