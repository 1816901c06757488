"""BASE: a balanced assignment of tokens to experts in training, so that no balance loss is needed."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from switchjax.config import MoEConfig, check_positive
from switchjax.moe.assignment import balanced_assignment
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import router_logits, select_experts
from switchjax.moe.routing import Router, RouterSizes, Routing, Tokens, Weight, Weights


@dataclass(frozen=True)
class BaseOptions:
    """Options of router base."""

    auction_rounds: int = 2000
    """Largest number of rounds; tokens still without an expert then take the slots that are left, in order."""

    def __post_init__(self) -> None:
        check_positive("moe.options", {"auction_rounds": self.auction_rounds})


def base_router(sizes: RouterSizes, options: Any, key: PRNGKeyArray) -> dict[str, Weight]:
    """Expert embeddings w_e, the columns of W_r [D, E]: orthogonal, with norm 0.1 (the rows if E > D)."""
    init = jax.nn.initializers.orthogonal(0.1)
    return {"logits": Weight(init(key, (sizes.d_model, sizes.num_experts), jnp.float32), ("embed", None))}


def route_base(weights: Weights, tokens: Tokens, config: MoEConfig, options: BaseOptions) -> Routing:
    """BASE (Lewis et al. 2021): `y = sigmoid(x . w_e) E_e(x)`, e from a balanced assignment in training.

    In training, the assignment maximises the sum of x . w_e while each expert gets at most ceil(S / E) tokens, whatever
    the capacity factor is (section 3.2); no token is dropped. In evaluation, each token goes to its best expert. The
    sigmoid carries the only gradient to w_e; the other losses are reported but have no gradient.
    """
    scores = router_logits(tokens.x, weights["logits"])
    logits = jax.lax.stop_gradient(scores)
    if tokens.training:
        tokens = dataclasses.replace(tokens, capacity=-(-tokens.x.shape[1] // config.num_experts))
        assigned = balanced_assignment(logits, tokens.mask, tokens.capacity, options.auction_rounds)
        expert_index = jnp.minimum(assigned, config.num_experts - 1)[..., None]  # padding's is not used
    else:
        expert_index = select_experts(tokens, config, logits)
    probs, gates = jax.nn.softmax(logits, axis=-1), jax.nn.sigmoid(scores)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index)


BASE = Router(route_base, base_router, options=BaseOptions, selected=(1,))
