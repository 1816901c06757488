"""ST-MoE: two experts per token, the second one only above a threshold."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from switchjax.config import MoEConfig, check_fraction
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import normalize_over_chosen, router_logits, select_experts, values_of_chosen
from switchjax.moe.routing import Router, Routing, Tokens, Weights


@dataclass(frozen=True)
class STMoEOptions:
    """Options of router st_moe."""

    second_expert_threshold: float = 0.2
    """The gate that a second expert must exceed."""

    def __post_init__(self) -> None:
        check_fraction("moe.options", {"second_expert_threshold": self.second_expert_threshold})


def route_st_moe(weights: Weights, tokens: Tokens, config: MoEConfig, options: STMoEOptions) -> Routing:
    """ST-MoE's top-2 (Zoph et al. 2022): GShard's gates, the second expert only if its gate exceeds a threshold.

    The threshold applies in training and in evaluation. The paper trains this router with the router z-loss.
    """
    logits = router_logits(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    gates = normalize_over_chosen(probs, expert_index)
    second = values_of_chosen(gates, expert_index)[..., 1]
    taken = jnp.stack([jnp.ones_like(second, bool), second > options.second_expert_threshold], axis=-1)
    return token_choice(
        tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index, taken=taken, counted=1
    )


ST_MOE = Router(route_st_moe, options=STMoEOptions, selected=(2,))
