"""Sinkhorn: a transport plan balances the choices in training, so that no balance loss is needed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from switchjax.config import MoEConfig, check_positive
from switchjax.moe.assignment import sinkhorn
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import router_logits, select_experts
from switchjax.moe.routing import Router, Routing, Tokens, Weights


@dataclass(frozen=True)
class SinkhornOptions:
    """Options of router sinkhorn."""

    sinkhorn_iterations: int = 20

    def __post_init__(self) -> None:
        check_positive("moe.options", {"sinkhorn_iterations": self.sinkhorn_iterations})


def route_sinkhorn(weights: Weights, tokens: Tokens, config: MoEConfig, options: SinkhornOptions) -> Routing:
    """S-BASE (Clark et al. 2022, section 3.1): `y = p_e(x) E_e(x)`, `p = softmax(x W_r)`.

    In training, e is the expert with the largest part of the token in the balanced transport plan of the logits, so
    experts get nearly equally many tokens. In evaluation, e is the most probable expert.
    """
    logits = router_logits(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    preferred = jax.lax.stop_gradient(logits)
    if tokens.training:
        preferred = jnp.log(sinkhorn(preferred, tokens.mask, options.sinkhorn_iterations))
    expert_index = select_experts(tokens, config, preferred)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=probs, expert_index=expert_index)


SINKHORN = Router(route_sinkhorn, options=SinkhornOptions, selected=(1,))
