"""Token choice in two levels: groups of experts, then experts within the groups."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from switchjax.config import MoEConfig, UserError, check_positive
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import router_logits
from switchjax.moe.losses import importance_loss, load_loss
from switchjax.moe.routers.noisy_top_k import IMPORTANCE, noisy_router, noisy_top_k, zeros
from switchjax.moe.routing import Router, RouterSizes, Routing, Tokens, Weight, Weights


@dataclass(frozen=True)
class HierarchicalOptions:
    """Options of router hierarchical."""

    num_expert_groups: int = 1
    """a, the number of groups that the experts are divided into."""
    num_selected_groups: int = 1
    """Number of groups that a token selects; it selects K / num_selected_groups experts in each."""

    def __post_init__(self) -> None:
        check_positive("moe.options", dataclasses.asdict(self))


def hierarchical_router(sizes: RouterSizes, options: HierarchicalOptions, key: PRNGKeyArray) -> dict[str, Weight]:
    """The weights of `noisy_router`, and "groups" and "groups_noise" [D, a] for the groups of experts."""
    groups = {name: zeros(sizes.d_model, options.num_expert_groups) for name in ("groups", "groups_noise")}
    return noisy_router(sizes, options, key) | groups


def check_hierarchy(config: MoEConfig, options: HierarchicalOptions) -> None:
    """Raises a `UserError` unless experts divide into groups, and a token's experts over the groups it selects."""
    experts, groups = config.num_experts, options.num_expert_groups
    selected, selected_groups = config.num_selected_experts, options.num_selected_groups
    if experts % groups:
        raise UserError(f"moe.num_experts={experts} do not divide into moe.options.num_expert_groups={groups}")
    if selected_groups > groups:
        raise UserError(f"moe.options: num_selected_groups={selected_groups} exceeds num_expert_groups={groups}")
    if selected % selected_groups:
        raise UserError(
            f"moe.num_selected_experts={selected} do not divide over moe.options.num_selected_groups={selected_groups}"
        )
    if selected // selected_groups > experts // groups:
        raise UserError(
            f"a token selects {selected // selected_groups} experts in a group, which has {experts // groups}: "
            f"moe.num_selected_experts={selected} is too large or moe.options.num_selected_groups={selected_groups} "
            "too small"
        )


def route_hierarchical(weights: Weights, tokens: Tokens, config: MoEConfig, options: HierarchicalOptions) -> Routing:
    """The two-level hierarchy of noisy top-K gates (Shazeer et al. 2017, appendix B).

    A token selects groups, and K / num_selected_groups experts in each. Expert j of group i, number `i * b + j`, has
    the gate `G'_i G_ij`, the product of the gates of both levels; the largest product comes first. Each level gates
    like `route_noisy_top_k`, so a single selected group or expert keeps its probability among all.
    """
    num_groups, selected_groups = options.num_expert_groups, options.num_selected_groups
    flat = (*tokens.mask.shape, config.num_experts)
    nested = (*tokens.mask.shape, num_groups, config.num_experts // num_groups)
    group_logits, group_std = (router_logits(tokens.x, weights[name]) for name in ("groups", "groups_noise"))
    group = noisy_top_k(
        group_level(tokens), dataclasses.replace(config, num_selected_experts=selected_groups), group_logits, group_std
    )
    # One row for each token and group, because each group gates its experts by itself.
    rows = (flat[0], flat[1] * num_groups, nested[-1])
    logits, std = (router_logits(tokens.x, weights[name]).reshape(rows) for name in ("logits", "noise"))
    expert = noisy_top_k(
        tokens,
        dataclasses.replace(config, num_selected_experts=config.num_selected_experts // selected_groups),
        logits,
        std,
    )

    def product(of_groups: Array, of_experts: Array) -> Array:
        return (of_groups[..., None] * of_experts.reshape(nested)).reshape(flat)

    gates, chosen = product(group.gates, expert.gates), product(group.chosen, expert.chosen)
    # Load_ij = Load'_i Load_i(X_i)_j / |X_i|, where X_i are the tokens sent to group i: a sum over these tokens.
    sent = group.chosen & tokens.mask[..., None]
    group_load = jnp.sum(group.load_probability, axis=1, keepdims=True, where=tokens.mask[..., None])
    share = group_load / jnp.maximum(jnp.sum(sent, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    load = product(jnp.where(sent, share, 0.0), expert.load_probability)
    return token_choice(
        tokens,
        config,
        logits=(group_logits[..., None] + logits.reshape(nested)).reshape(flat),  # the z-loss keeps both small
        probs=product(group.probs, expert.probs),
        gates=gates,
        expert_index=jax.lax.top_k(jnp.where(chosen, gates, -1.0), config.num_selected_experts)[1],
        losses={
            "importance_loss": importance_loss(jnp.where(chosen, gates, 0.0), tokens.mask),
            "load_loss": load_loss(load, tokens.mask),
        },
    )


def group_level(tokens: Tokens) -> Tokens:
    """The tokens with other keys, for the noise of the first level."""
    return dataclasses.replace(tokens, keys=tokens.random("group level", lambda key: key) if tokens.training else None)


HIERARCHICAL = Router(
    route_hierarchical, hierarchical_router, options=HierarchicalOptions, losses=IMPORTANCE, check=check_hierarchy
)
