"""Sigmoid scores, balanced by a bias on the selection instead of a loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.config import MoEConfig, UserError, check_positive
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import normalize_over_chosen, router_logits, select_experts, values_of_chosen
from switchjax.moe.losses import count_choices
from switchjax.moe.routing import Router, RouterSizes, Routing, Tokens, Weight, Weights, linear_router


@dataclass(frozen=True)
class SigmoidOptions:
    """Options of router sigmoid."""

    bias_update_rate: float = 0.001
    """Amount by which an expert's bias rises or falls after each train step."""
    normalize_gates: bool = True
    """Gates of a token's K > 1 experts sum to 1."""

    def __post_init__(self) -> None:
        check_positive("moe.options", {"bias_update_rate": self.bias_update_rate})


def sigmoid_router(sizes: RouterSizes, options: SigmoidOptions, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_r as in `linear_router`, and the bias b [E], 0 at first, which `move_bias` moves."""
    bias = Weight(jnp.zeros(sizes.num_experts, jnp.float32), (None,), trained=False)
    return linear_router(sizes, options, key) | {"bias": bias}


def check_sigmoid(config: MoEConfig, options: SigmoidOptions) -> None:
    """Raises a `UserError` for `moe.no_token_left_behind`, which would rank the next experts without b."""
    if config.no_token_left_behind:
        raise UserError(
            "moe.no_token_left_behind ranks experts by probability, but moe.router=sigmoid also by its bias: "
            "set moe.no_token_left_behind=0"
        )


def route_sigmoid(weights: Weights, tokens: Tokens, config: MoEConfig, options: SigmoidOptions) -> Routing:
    """DeepSeek-V3's routing, balanced without a loss (Wang et al. 2024; DeepSeek-AI 2024, section 2.1.2).

    `s = sigmoid(x W_r)`; a token selects the K experts with the highest `s + b`. Gates are their s, divided by their
    sum if `normalize_gates` and K > 1; the bias b plays no part in them.
    """
    logits = router_logits(tokens.x, weights["logits"])
    log_s = jax.nn.log_sigmoid(logits)
    gates = s = jnp.exp(log_s)
    scores = s + weights["bias"][None, None]
    if config.sample_experts and tokens.training:
        # `select_experts` draws from the softmax of scores, so their logarithm makes the draw proportional to s + b.
        scores = jnp.log(jnp.maximum(scores, jnp.finfo(jnp.float32).tiny))
    expert_index = select_experts(tokens, config, scores)
    if options.normalize_gates and config.num_selected_experts > 1:
        # All chosen s may underflow, so divide by the largest of them first. Experts above it were not chosen.
        top = jax.lax.stop_gradient(jnp.max(values_of_chosen(log_s, expert_index), axis=-1, keepdims=True))
        gates = normalize_over_chosen(jnp.exp(jnp.where(log_s > top, 0.0, log_s - top)), expert_index)
    taken = jnp.broadcast_to(tokens.mask[..., None], expert_index.shape)
    return token_choice(
        tokens,
        config,
        logits=logits,
        probs=jax.nn.softmax(log_s, axis=-1),  # s over its sum
        gates=gates,
        expert_index=expert_index,
        state_sums={"load": count_choices(expert_index, taken, config.num_experts)},
    )


def move_bias(weights: Weights, sums: Mapping[str, Float[Array, "E"]], options: SigmoidOptions) -> dict[str, Array]:
    """The bias after a step: lower for an expert above the mean load, higher below it."""
    excess = sums["load"] - jnp.mean(sums["load"])
    return {"bias": weights["bias"] - options.bias_update_rate * jnp.sign(excess)}


SIGMOID = Router(route_sigmoid, sigmoid_router, options=SigmoidOptions, next_state=move_bias, check=check_sigmoid)
