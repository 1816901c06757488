"""Reinforced routing, RL-R (Clark et al. 2022): the choice of the expert is an action, the router its policy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import router_logits, select_experts, values_of_chosen
from switchjax.moe.routing import (
    BALANCE,
    NoOptions,
    Router,
    RouterSizes,
    Routing,
    Tokens,
    Weight,
    Weights,
    linear_router,
)


def reinforced_router(sizes: RouterSizes, options: Any, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r [D, E] of the policy, and w_b [D, 1] of the baseline, which starts at 0."""
    baseline = Weight(jnp.zeros((sizes.d_model, 1)), ("embed", None))
    return {**linear_router(sizes, options, key), "baseline": baseline}


def route_reinforced(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """In training, a random expert `a ~ pi(. | x) = softmax(x W_r)`; in evaluation, the most probable one.

    `policy_loss` uses `log_policy = log pi(a | x)` and `baseline = x . w_b`, an estimate of the token's reward, whose
    gradient stops at x. `policy_entropy_loss` is the negative entropy, so it rewards entropy.

    The gate is the probability of the chosen expert, as in Switch. This is our choice: besides the policy's gradient,
    the router then has that of the language model, which varies less.
    """
    logits = router_logits(tokens.x, weights["logits"])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    expert_index = select_experts(tokens, dataclasses.replace(config, sample_experts=True), logits)
    baseline = router_logits(jax.lax.stop_gradient(tokens.x), weights["baseline"])[..., 0]
    return token_choice(
        tokens,
        config,
        logits=logits,
        probs=probs,
        gates=probs,
        expert_index=expert_index,
        losses={"policy_entropy_loss": jnp.sum(probs * log_probs, axis=(1, 2), where=tokens.mask[..., None])},
        token_values={
            "log_policy": jnp.where(tokens.mask, values_of_chosen(log_probs, expert_index)[..., 0], 0.0),
            "baseline": jnp.where(tokens.mask, baseline, 0.0),
        },
    )


def policy_loss(
    values: Mapping[str, Float[Array, "N B L"]], reward: Float[Array, "B L"], mask: Bool[Array, "B L"]
) -> dict[str, Float[Array, "N"]]:
    """REINFORCE (Williams 1992): `sum over tokens of -(R - b) log pi(a|x) + (R - b)^2 / 2`, for each of N layers.

    R is `reward`, the log-probability of the token's target, and b the baseline. R - b is constant in the first term,
    whose gradient is an unbiased estimate of the gradient of `-E[R]` for any baseline. The second term moves the
    baseline towards the expected reward.
    """
    advantage = jax.lax.stop_gradient(reward)[None] - values["baseline"]
    loss = -jax.lax.stop_gradient(advantage) * values["log_policy"] + jnp.square(advantage) / 2
    return {"policy_loss": jnp.sum(loss, axis=(1, 2), where=mask[None])}


REINFORCED = Router(
    route_reinforced,
    reinforced_router,
    losses={**BALANCE, "policy_entropy_loss": 0.01, "policy_loss": 0.01},
    reward_losses=policy_loss,
    selected=(1,),
)
