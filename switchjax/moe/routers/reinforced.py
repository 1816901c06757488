"""Reinforced routing, RL-R (Clark et al. 2022): the choice of the expert is an action, the router its policy."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.choice import gates_of, select_experts, token_choice
from switchjax.moe.routing import RouterSizes, Routing, Tokens, Weight, Weights, linear_router, project


def reinforced_router(sizes: RouterSizes, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r [D, E] of the policy, and w_b [D, 1] of the baseline, which starts at 0."""
    baseline = Weight(jnp.zeros((sizes.d_model, 1)), ("embed", None))
    return {**linear_router(sizes, key), "baseline": baseline}


def route_reinforced(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """In training an expert `a ~ pi(. | x) = softmax(x W_r)`, in evaluation the most probable.

    `switchjax.training.reinforce` makes the policy's loss of `log_policy = log pi(a | x)` and of `baseline = x . w_b`,
    the reward that the token can expect; the baseline watches the tokens and has no say in what they become. Entropy is
    rewarded by `policy_entropy_loss`, the sum of its negative.

    The gate is the probability of the chosen expert, as in Switch: our choice, by which the router keeps the language
    model's gradient, of little variance, beside the policy's.
    """
    logits = project(tokens.x, weights["logits"])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    expert_index = select_experts(tokens, dataclasses.replace(config, sample_experts=True), logits)
    baseline = project(jax.lax.stop_gradient(tokens.x), weights["baseline"])[..., 0]
    return token_choice(
        tokens,
        config,
        logits=logits,
        probs=probs,
        gates=probs,
        expert_index=expert_index,
        losses={"policy_entropy_loss": jnp.sum(probs * log_probs, axis=(1, 2), where=tokens.mask[..., None])},
        token_values={
            "log_policy": jnp.where(tokens.mask, gates_of(log_probs, expert_index)[..., 0], 0.0),
            "baseline": jnp.where(tokens.mask, baseline, 0.0),
        },
    )
