"""Token choice by sigmoid scores, balanced by a bias on the choice instead of by a loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.config import MoEConfig, UserError
from switchjax.moe.choice import gates_of, select_experts, token_choice
from switchjax.moe.losses import choices_of_experts
from switchjax.moe.routing import RouterSizes, Routing, Tokens, Weight, Weights, linear_router, project


def sigmoid_router(sizes: RouterSizes, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r as `linear_router`, and the bias b [E], 0 at first, which moves by the sign of its gradient."""
    bias = Weight(jnp.zeros(sizes.num_experts, jnp.float32), (None,), update="sign")
    return linear_router(sizes, key) | {"bias": bias}


def check_sigmoid(config: MoEConfig) -> None:
    """Raises a `UserError` for tokens sent on to their next best experts, which would go by the scores without b."""
    if config.no_token_left_behind:
        raise UserError(
            "moe.no_token_left_behind goes by probabilities, and moe.router=sigmoid chooses by its bias too: "
            "set moe.no_token_left_behind=0"
        )


def route_sigmoid(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """DeepSeek-V3's routing, balanced without a loss (Wang et al. 2024; DeepSeek-AI 2024, section 2.1.2).

    `s = sigmoid(x W_r)`; the K experts of the highest `s + b` are selected, and gates are their s, over their sum
    where `moe.normalize_gates` and K > 1. The bias b takes part in the selection alone. After each step it falls by
    `moe.bias_update_rate` where an expert had more than the mean load, and rises where it had less.
    """
    logits, bias = project(tokens.x, weights["logits"]), weights["bias"]
    log_s = jax.nn.log_sigmoid(logits)
    gates = s = jnp.exp(log_s)
    scores = s + bias[None, None]
    if config.sample_experts and tokens.training:
        # Drawn from the softmax of the scores, which is to be in proportion to s + b.
        scores = jnp.log(jnp.maximum(scores, jnp.finfo(jnp.float32).tiny))
    expert_index = select_experts(tokens, config, scores)
    if config.normalize_gates and config.num_selected_experts > 1:
        # All the chosen s may underflow, so over the largest of them first; an expert above it was not chosen.
        top = jax.lax.stop_gradient(jnp.max(gates_of(log_s, expert_index), axis=-1, keepdims=True))
        s = jnp.exp(jnp.where(log_s > top, 0.0, log_s - top))
        gates = s / jnp.sum(gates_of(s, expert_index), axis=-1, keepdims=True)
    taken = jnp.broadcast_to(tokens.mask[..., None], expert_index.shape)
    return token_choice(
        tokens,
        config,
        logits=logits,
        probs=jax.nn.softmax(log_s, axis=-1),  # s over its sum
        gates=gates,
        expert_index=expert_index,
        losses={"bias_loss": bias_loss(bias, choices_of_experts(expert_index, taken, config.num_experts))},
    )


def bias_loss(bias: Float[Array, "E"], load: Float[Array, "G E"]) -> Float[Array, "G"]:
    """0, with the gradient `load_e - mean load` for the bias: a sum over tokens, so it adds up over groups and devices.

    Args:
        bias: b.
        load: choices of each expert, before capacity.
    """
    excess = jax.lax.stop_gradient(load - jnp.mean(load, axis=-1, keepdims=True))
    value = jnp.sum(bias[None] * excess, axis=-1)
    return value - jax.lax.stop_gradient(value)
