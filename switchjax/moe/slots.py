"""Expert buffers of static shape: which choice of which token fills which slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from switchjax.config import MoEConfig, UserError


def capacity_of(config: MoEConfig, num_experts: int, group_size: int, training: bool) -> int:
    """C, slots that each of `num_experts` experts has for a group of `group_size` tokens.

    All of them if dropless; `moe.expert_capacity` where that is set; else by the capacity factor.
    """
    if config.dropless:
        return group_size
    if config.expert_capacity:
        return min(config.expert_capacity, group_size)
    factor = config.train_capacity_factor if training else config.eval_capacity_factor
    return expert_capacity(group_size, num_experts, config.num_selected_experts, factor, config.min_expert_capacity)


def expert_capacity(
    group_size: int, num_experts: int, num_selected_experts: int, capacity_factor: float, min_expert_capacity: int
) -> int:
    """Slots an expert has for each group: `max(floor(factor * S * K / E), minimum)`, at most S.

    A token selects an expert at most once, so more than S slots could never fill (Switch Transformer, eq. 3).

    Raises:
        UserError: if the factor or the minimum is not positive.
    """
    if capacity_factor <= 0 or min_expert_capacity <= 0:
        raise UserError(
            f"capacity factor and minimum capacity must be positive, got {capacity_factor} and {min_expert_capacity}"
        )
    slots = int(capacity_factor * group_size * num_selected_experts / num_experts)
    return min(max(slots, min_expert_capacity), group_size)


def fill_slots(
    expert_index: Int[Array, "G S K"],
    taken: Bool[Array, "G S K"],
    num_experts: int,
    capacity: int,
    rank: Int[Array, "G S K"] | None = None,
) -> tuple[Int[Array, "G E C"], Int[Array, "G S K"]]:
    """Puts choices into the experts' buffers, in the order of their rank.

    Args:
        expert_index: the experts that each token selects, distinct, in the order of preference.
        taken: False for a choice that asks for no slot, such as those of padding.
        num_experts: E.
        capacity: C, slots of an expert.
        rank: who comes first; None: first come first served, all first choices before any second one.

    Returns:
        slot_choice: which choice fills each slot, as `k * S + s` (K * S where the slot stays empty).
        choice_slot: its inverse, the slot `e * C + c` of each choice (E * C where it was dropped).
    """
    groups, tokens, selected = expert_index.shape
    choices = selected * tokens
    expert = jnp.where(taken, expert_index, num_experts).swapaxes(1, 2).reshape(groups, choices)
    # A stable sort lines up each expert's choices in their order of arrival.
    if rank is None:
        order = jnp.argsort(expert, axis=1, stable=True)
    else:
        order = jnp.lexsort((rank.swapaxes(1, 2).reshape(groups, choices), expert), axis=1)
    in_line = jnp.take_along_axis(expert, order, axis=1)
    bounds = jax.vmap(lambda line: jnp.searchsorted(line, jnp.arange(num_experts + 1)))(in_line)
    first, end = bounds[:, :-1], bounds[:, 1:]

    rank = first[:, :, None] + jnp.arange(capacity)[None, None]
    filled = rank < end[:, :, None]
    slots = jnp.take_along_axis(order, jnp.minimum(rank, choices - 1).reshape(groups, -1), axis=1)
    slot_choice = jnp.where(filled, slots.reshape(filled.shape), choices)

    place = jnp.argsort(order, axis=1)  # the inverse permutation: where in the line each choice stands
    position = place - jnp.take_along_axis(bounds, expert, axis=1)
    kept = (expert < num_experts) & (position < capacity)
    choice_slot = jnp.where(kept, expert * capacity + position, num_experts * capacity)
    return slot_choice, choice_slot.reshape(groups, selected, tokens).swapaxes(1, 2)
