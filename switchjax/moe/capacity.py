"""Expert capacity: how many slots an expert has, and which choice of which token fills which slot.

Buffers have a static shape: E experts x C slots for each group. When an expert is full, settings of the section `moe`
decide which choices get its slots and what happens to the others; all routers in which tokens choose share them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchjax.config import MoEConfig, UserError
from switchjax.moe.choice import is_chosen, values_of_chosen
from switchjax.moe.gather_sum import gather_sum
from switchjax.moe.losses import load_balance_loss, router_z_loss, sum_metrics
from switchjax.moe.routing import Routing, Tokens


def capacity_of(config: MoEConfig, num_experts: int, group_size: int, training: bool) -> int:
    """C, the slots of each expert for a group: S if `moe.dropless`, else `moe.expert_capacity`, else by the factors."""
    if config.dropless:
        return group_size
    if config.expert_capacity:
        return min(config.expert_capacity, group_size)
    factor = config.train_capacity_factor if training else config.eval_capacity_factor
    return expert_capacity(group_size, num_experts, config.num_selected_experts, factor, config.min_expert_capacity)


def expert_capacity(
    group_size: int, num_experts: int, num_selected_experts: int, capacity_factor: float, min_expert_capacity: int
) -> int:
    """Slots of an expert for each group: `max(floor(factor * S * K / E), minimum)` (Switch Transformer, eq. 3).

    At most S, because a token selects an expert at most once.

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
        capacity: C.
        rank: lower ranks come first; None: first come, first served, all first choices before any second choice.

    Returns:
        slot_choice: the choice in each slot, as `k * S + s`; K * S in an empty slot.
        choice_slot: its inverse, the slot `e * C + c` of each choice; E * C for a dropped choice.
    """
    groups, tokens, selected = expert_index.shape
    choices = selected * tokens
    expert = jnp.where(taken, expert_index, num_experts).swapaxes(1, 2).reshape(groups, choices)
    # One stable sort by expert puts all choices in a line in which each expert's choices stand together, in their order
    # of arrival. A choice's buffer position is its distance from the first of its expert. The papers' cumsum over
    # one-hot masks gives the same with E times the memory.
    if rank is None:
        order = jnp.argsort(expert, axis=1, stable=True)
    else:
        order = jnp.lexsort((rank.swapaxes(1, 2).reshape(groups, choices), expert), axis=1)
    in_line = jnp.take_along_axis(expert, order, axis=1)
    bounds = jax.vmap(lambda line: jnp.searchsorted(line, jnp.arange(num_experts + 1)))(in_line)
    first, end = bounds[:, :-1], bounds[:, 1:]

    # Slot c of expert e holds the choice that stands c places after the expert's first.
    source = first[:, :, None] + jnp.arange(capacity)[None, None]
    filled = source < end[:, :, None]
    slots = jnp.take_along_axis(order, jnp.minimum(source, choices - 1).reshape(groups, -1), axis=1)
    slot_choice = jnp.where(filled, slots.reshape(filled.shape), choices)

    place = jnp.argsort(order, axis=1)  # the inverse permutation: the place of each choice in the line
    position = place - jnp.take_along_axis(bounds, expert, axis=1)
    kept = (expert < num_experts) & (position < capacity)
    choice_slot = jnp.where(kept, expert * capacity + position, num_experts * capacity)
    return slot_choice, choice_slot.reshape(groups, selected, tokens).swapaxes(1, 2)


def token_choice(
    tokens: Tokens,
    config: MoEConfig,
    *,
    logits: Float[Array, "G S E"],
    probs: Float[Array, "G S E"],
    gates: Float[Array, "G S E"],
    expert_index: Int[Array, "G S K"],
    taken: Bool[Array, "G S K"] | None = None,
    counted: int | None = None,
    losses: Mapping[str, Float[Array, "G"]] | None = None,
    token_values: Mapping[str, Float[Array, "G S"]] | None = None,
    state_sums: Mapping[str, Float[Array, "G ..."]] | None = None,
) -> Routing:
    """The routing in which each token goes to the experts it selected, as far as their buffers have room.

    With K > 1, a second choice may lose its slot to the first choice of a later token, unless
    `moe.fill_order=token_by_token`.

    Args:
        tokens: the tokens as the router saw them.
        config: the section `moe`, which decides who gets slots.
        logits: the router's logits, for its z-loss.
        probs: probabilities of the experts, for the load-balance loss and the metrics.
        gates: the weight of each expert's output if the token goes to it.
        expert_index: the selected experts, distinct, in the order of preference.
        taken: False for a choice that the token gives up, which does not count as routed; None: all are taken.
        counted: number of a token's choices that the load-balance loss counts; None: all.
        losses: further losses of the router, as in `Routing`; `token_values` and `state_sums` likewise.
    """
    num_experts, num_tokens = probs.shape[-1], probs.shape[1]
    real = jnp.broadcast_to(tokens.mask[..., None], expert_index.shape)
    taken = real if taken is None else real & taken
    rank = fill_rank(tokens, config, values_of_chosen(jax.lax.stop_gradient(gates), expert_index))
    placed, final_rank = leave_no_token_behind(tokens, config, probs, expert_index, taken, rank)
    slot_choice, choice_slot = fill_slots(placed, taken, num_experts, tokens.capacity, final_rank)
    empty = slot_choice == placed.shape[-1] * num_tokens
    return Routing(
        slot_token=jnp.where(empty, num_tokens, slot_choice % num_tokens),
        slot_gate=gates_of_slots(values_of_chosen(gates, placed), slot_choice, choice_slot),
        token_slot=choice_slot,
        num_tokens=num_tokens,
        losses={
            "load_balance_loss": load_balance_loss(probs, expert_index[..., :counted], tokens.mask),
            "router_z_loss": router_z_loss(logits, tokens.mask),
            **(losses or {}),
        },
        metrics=sum_metrics(probs, expert_index, taken, jnp.sum(~empty, axis=(1, 2)), tokens.mask),
        token_values=dict(token_values or {}),
        state_sums=dict(state_sums or {}),
    )


def fill_rank(tokens: Tokens, config: MoEConfig, gate: Float[Array, "G S K"]) -> Int[Array, "G S K"] | None:
    """The order in which choices take slots, by `moe.fill_order`; None for first come, first served.

    `random` (random token selection, DeepSpeed-MoE) means first come in evaluation.
    """
    num_tokens, selected = gate.shape[1:]
    if config.fill_order == "token_by_token":
        return jnp.broadcast_to(jnp.arange(num_tokens * selected).reshape(1, num_tokens, selected), gate.shape)
    if config.fill_order == "batch_prioritized":  # Riquelme et al. 2021, section 4.1
        priority = jnp.max(gate, axis=-1)
    elif config.fill_order == "random" and tokens.training:
        priority = tokens.random("fill order", lambda key: jax.random.uniform(key, (num_tokens,)))
    else:
        return None
    place = jnp.argsort(jnp.argsort(-priority, axis=-1, stable=True), axis=-1)
    return place[..., None] + num_tokens * jnp.arange(selected)[None, None]


def leave_no_token_behind(
    tokens: Tokens,
    config: MoEConfig,
    probs: Float[Array, "G S E"],
    expert_index: Int[Array, "G S K"],
    taken: Bool[Array, "G S K"],
    rank: Int[Array, "G S K"] | None,
) -> tuple[Int[Array, "G S K"], Int[Array, "G S K"] | None]:
    """The experts and ranks of choices after `moe.no_token_left_behind` rounds (Switch Transformer, appendix B).

    In each round, choices over capacity go to the token's next best expert. There they queue behind all others, so no
    choice loses its slot.
    """
    num_tokens, selected = expert_index.shape[1:]
    num_experts = probs.shape[-1]
    if not config.no_token_left_behind:
        return expert_index, rank
    if rank is None:
        first_come = jnp.arange(num_tokens)[:, None] + num_tokens * jnp.arange(selected)[None]  # as without ranks
        rank = jnp.broadcast_to(first_come[None], expert_index.shape)
    tried = is_chosen(expert_index, num_experts)
    for _ in range(config.no_token_left_behind):
        _, choice_slot = fill_slots(expert_index, taken, num_experts, tokens.capacity, rank)
        dropped = taken & (choice_slot == num_experts * tokens.capacity)
        value, best = jax.lax.top_k(jnp.where(tried, -1.0, probs), selected)
        # A token's first dropped choice takes the best expert that it has not tried, its second the second best.
        nth = jnp.maximum(jnp.cumsum(dropped, axis=-1) - 1, 0)
        moved = dropped & (jnp.take_along_axis(value, nth, axis=-1) >= 0)
        expert_index = jnp.where(moved, jnp.take_along_axis(best, nth, axis=-1), expert_index)
        rank = rank + jnp.where(moved, num_tokens * selected, 0)
        tried |= is_chosen(expert_index, num_experts)
    return expert_index, rank


def gates_of_slots(
    gate: Float[Array, "G S K"], slot_choice: Int[Array, "G E C"], choice_slot: Int[Array, "G S K"]
) -> Float[Array, "G E C"]:
    """The gate of the choice in each slot, 0 in an empty slot; differentiable in `gate`."""

    def one_group(gate: Array, slot_choice: Array, choice_slot: Array) -> Array:
        rows = gate.T.reshape(-1, 1)  # choice k * S + s, as `fill_slots` numbers them
        return gather_sum(rows, slot_choice.reshape(-1, 1), choice_slot.T.reshape(-1, 1)).reshape(slot_choice.shape)

    return jax.vmap(one_group)(gate, slot_choice, choice_slot)
