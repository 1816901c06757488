"""Token choice: from the experts that tokens prefer to filled slots, under any policy of who comes first."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchjax.config import MoEConfig
from switchjax.moe.losses import load_balance_loss, router_z_loss, routing_metrics
from switchjax.moe.routing import Routing, Tokens, gates_of_slots
from switchjax.moe.slots import fill_slots


def select_experts(tokens: Tokens, config: MoEConfig, scores: Float[Array, "G S E"]) -> Int[Array, "G S K"]:
    """The K experts of the highest scores, the first of equals first.

    With `moe.sample_experts`, in training, K experts drawn without replacement from the softmax of the scores: the
    highest after Gumbel noise.
    """
    if config.sample_experts and tokens.training:
        scores = scores + tokens.random("sample", lambda key: jax.random.gumbel(key, scores.shape[1:]))
    if config.num_selected_experts == 1:
        return jnp.argmax(scores, axis=-1, keepdims=True)
    return jax.lax.top_k(scores, config.num_selected_experts)[1]


def gates_of(values: Float[Array, "G S E"], expert_index: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """`values` of the chosen experts, by masked sums: the derivative of a gather would be a scatter."""
    chosen = jax.nn.one_hot(expert_index, values.shape[-1], dtype=bool)
    return jnp.sum(values[..., None, :], axis=-1, where=chosen)


def is_chosen(expert_index: Int[Array, "G S K"], num_experts: int) -> Bool[Array, "G S E"]:
    """Which experts are among the chosen."""
    return jnp.any(jax.nn.one_hot(expert_index, num_experts, dtype=bool), axis=2)


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
) -> Routing:
    """The routing in which each token goes to the experts it selected, as far as their buffers reach.

    With K > 1 and full buffers, a second choice may lose its slot to the first choice of a token after it; that
    `moe.fill_order=token_by_token` rules out.

    Args:
        tokens: what the router saw.
        config: capacity and policies.
        logits: of the router, for its z-loss.
        probs: probabilities of the experts, for the load-balance loss and the metrics.
        gates: the weight that each expert's output gets if the token goes to it.
        expert_index: the experts selected, distinct, in the order of preference.
        taken: False for a choice that is given up, which is then not counted as routed; None: all are taken.
        counted: how many choices of a token the load-balance loss counts; None: all.
        losses: further sums over tokens.
        token_values: see `Routing`.
    """
    num_experts, num_tokens = probs.shape[-1], probs.shape[1]
    real = jnp.broadcast_to(tokens.mask[..., None], expert_index.shape)
    taken = real if taken is None else real & taken
    rank = fill_rank(tokens, config, gates_of(jax.lax.stop_gradient(gates), expert_index))
    placed, final_rank = leave_no_token_behind(tokens, config, probs, expert_index, taken, rank)
    slot_choice, choice_slot = fill_slots(placed, taken, num_experts, tokens.capacity, final_rank)
    empty = slot_choice == placed.shape[-1] * num_tokens
    return Routing(
        slot_token=jnp.where(empty, num_tokens, slot_choice % num_tokens),
        slot_gate=gates_of_slots(gates_of(gates, placed), slot_choice, choice_slot),
        token_slot=choice_slot,
        num_tokens=num_tokens,
        losses={
            "load_balance_loss": load_balance_loss(probs, expert_index[..., :counted], tokens.mask),
            "router_z_loss": router_z_loss(logits, tokens.mask),
            **(losses or {}),
        },
        metrics=routing_metrics(probs, expert_index, taken, jnp.sum(~empty, axis=(1, 2)), tokens.mask),
        token_values=dict(token_values or {}),
    )


def fill_rank(tokens: Tokens, config: MoEConfig, gate: Float[Array, "G S K"]) -> Int[Array, "G S K"] | None:
    """The order in which choices take slots, `moe.fill_order`; None for first come, first served.

    `random` is so in training only (random token selection, DeepSpeed-MoE); in evaluation it is first come.
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
    """Sends choices over capacity to the token's next best expert, `moe.no_token_left_behind` times over.

    Those sent on come after all that were there before, so nobody loses a slot (Switch Transformer, appendix B).

    Returns:
        The experts at last, and the order in which choices take their slots.
    """
    num_tokens, selected = expert_index.shape[1:]
    num_experts = probs.shape[-1]
    if not config.no_token_left_behind:
        return expert_index, rank
    if rank is None:
        first_come = jnp.arange(num_tokens)[:, None] + num_tokens * jnp.arange(selected)[None]
        rank = jnp.broadcast_to(first_come[None], expert_index.shape)
    tried = is_chosen(expert_index, num_experts)
    for _ in range(config.no_token_left_behind):
        _, choice_slot = fill_slots(expert_index, taken, num_experts, tokens.capacity, rank)
        dropped = taken & (choice_slot == num_experts * tokens.capacity)
        value, best = jax.lax.top_k(jnp.where(tried, -1.0, probs), selected)
        # A token's first dropped choice takes the best expert that is left, its second the second best.
        nth = jnp.maximum(jnp.cumsum(dropped, axis=-1) - 1, 0)
        moved = dropped & (jnp.take_along_axis(value, nth, axis=-1) >= 0)
        expert_index = jnp.where(moved, jnp.take_along_axis(best, nth, axis=-1), expert_index)
        rank = rank + jnp.where(moved, num_tokens * selected, 0)
        tried |= is_chosen(expert_index, num_experts)
    return expert_index, rank
