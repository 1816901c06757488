"""Routers whose choices are balanced in training, so that they need no balance loss: BASE and S-BASE."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.assignment import balanced_assignment, sinkhorn
from switchjax.moe.choice import select_experts, token_choice
from switchjax.moe.routing import RouterSizes, Routing, Tokens, Weight, Weights, project


def base_router(sizes: RouterSizes, key: PRNGKeyArray) -> dict[str, Weight]:
    """Expert embeddings w_e, the columns of W_r [D, E]: orthogonal, of norm 0.1 (rows, where E > D)."""
    init = jax.nn.initializers.orthogonal(0.1)
    return {"logits": Weight(init(key, (sizes.d_model, sizes.num_experts), jnp.float32), ("embed", None))}


def route_base(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """BASE (Lewis et al. 2021): `y = sigmoid(x . w_e) E_e(x)`, e from a balanced assignment in training.

    In training each expert gets ceil(S / E) tokens at most, whatever the capacity factor, such that the sum of x . w_e
    is as large as can be (section 3.2): no token is dropped. In evaluation each token goes to its best expert. The only
    gradient to w_e is through the sigmoid; the losses of other routers are reported, without a gradient.
    """
    scores = project(tokens.x, weights["logits"])
    logits = jax.lax.stop_gradient(scores)
    if tokens.training:
        tokens = dataclasses.replace(tokens, capacity=-(-tokens.x.shape[1] // config.num_experts))
        assigned = balanced_assignment(logits, tokens.mask, tokens.capacity, config.auction_rounds)
        expert_index = jnp.minimum(assigned, config.num_experts - 1)[..., None]  # padding's is not looked at
    else:
        expert_index = select_experts(tokens, config, logits)
    probs, gates = jax.nn.softmax(logits, axis=-1), jax.nn.sigmoid(scores)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index)


def route_sinkhorn(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """S-BASE (Clark et al. 2022, section 3.1): `y = p_e(x) E_e(x)`, `p = softmax(x W_r)`.

    In training, e is the expert to which the balanced transport plan of the logits sends most of the token: nearly as
    many tokens each. In evaluation it is the most probable one.
    """
    logits = project(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    preferred = jax.lax.stop_gradient(logits)
    if tokens.training:
        preferred = jnp.log(sinkhorn(preferred, tokens.mask, config.sinkhorn_iterations))
    expert_index = select_experts(tokens, config, preferred)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=probs, expert_index=expert_index)
