"""The routers by name, and their options and losses in a section `moe`. CONTRIBUTING shows how to add a router."""

from typing import Any

from switchjax.config import MoEConfig, UserError, check_choice, from_mapping, suggest
from switchjax.moe.routers.base import BASE
from switchjax.moe.routers.expert_choice import EXPERT_CHOICE
from switchjax.moe.routers.gshard import GSHARD
from switchjax.moe.routers.hash import HASH
from switchjax.moe.routers.hierarchical import HIERARCHICAL
from switchjax.moe.routers.noisy_top_k import NOISY_TOP_K
from switchjax.moe.routers.reinforced import REINFORCED
from switchjax.moe.routers.sigmoid import SIGMOID
from switchjax.moe.routers.sinkhorn import SINKHORN
from switchjax.moe.routers.st_moe import ST_MOE
from switchjax.moe.routers.switch import SWITCH
from switchjax.moe.routers.top_k import TOP_K
from switchjax.moe.routers.v_moe import V_MOE
from switchjax.moe.routing import Router

ROUTERS: dict[str, Router] = {
    "switch": SWITCH,
    "top_k": TOP_K,
    "gshard": GSHARD,
    "st_moe": ST_MOE,
    "noisy_top_k": NOISY_TOP_K,
    "v_moe": V_MOE,
    "hierarchical": HIERARCHICAL,
    "sigmoid": SIGMOID,
    "expert_choice": EXPERT_CHOICE,
    "hash": HASH,
    "base": BASE,
    "sinkhorn": SINKHORN,
    "reinforced": REINFORCED,
}


def router_of(config: MoEConfig) -> Router:
    """The router that `moe.router` names; raises a `UserError` for an unknown name."""
    check_choice("moe.router", config.router, ROUTERS)
    return ROUTERS[config.router]


def router_options(config: MoEConfig) -> Any:
    """`moe.options` as the router's own dataclass; raises a `UserError` for an unknown option or a wrong value."""
    return from_mapping(router_of(config).options, config.options, "moe.options")


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """The weight of each of the router's losses: from `moe.loss_weights`, or else its default.

    Raises:
        UserError: if `moe.loss_weights` names a loss that the router lacks.
    """
    losses = router_of(config).losses
    for name in config.loss_weights:
        if name not in losses:
            raise UserError(f"moe.loss_weights: router {config.router} has no loss '{name}'{suggest(name, losses)}")
    return {**losses, **config.loss_weights}


def check_router(config: MoEConfig) -> None:
    """Raises a `UserError` unless the router exists and supports all settings of the section `moe`."""
    router, options = router_of(config), router_options(config)
    loss_weights(config)
    if router.selected is not None and config.num_selected_experts not in router.selected:
        raise UserError(
            f"moe.router={config.router} selects {' or '.join(map(str, router.selected))} expert(s), "
            f"but moe.num_selected_experts={config.num_selected_experts}"
        )
    if router.check is not None:
        router.check(config, options)


def noncausal_because(config: MoEConfig) -> str | None:
    """The reason why later tokens can change a token's experts in evaluation; None if they cannot."""
    if (reason := router_of(config).noncausal) is not None:
        return reason
    if config.dropless:
        return None
    if config.fill_order == "batch_prioritized":
        return "batch-prioritised routing lets a later token with a higher gate take a slot"
    if config.no_token_left_behind:
        return "a token sent on to another expert comes after the first choices of later tokens"
    if config.num_selected_experts > 1 and config.fill_order != "token_by_token":
        return "a second choice loses its slot to the first choice of a later token"
    return None
