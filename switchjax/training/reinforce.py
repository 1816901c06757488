"""REINFORCE for routers whose choice is an action (Clark et al. 2022; Williams 1992)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchjax.models.model import Routing
from switchjax.moe.layer import RoutingSums


def with_policy_losses(
    routing: Routing,
    log_probs: Float[Array, "B T"],
    target_segments: Int[Array, "B T"],
    segments: dict[str, Int[Array, "B _"]],
) -> Routing:
    """Routing sums in which `policy_loss` takes the place of `log_policy` and `baseline`, where these are.

    Args:
        routing: of each stack, the two per token and layer [layers, B, L].
        log_probs: of the targets: the reward of a decoder's tokens, each of which has its own; of an encoder's, the
            mean over the targets of their packed sequence.
        target_segments: of the targets.
        segments: of each stack's tokens.
    """

    def with_loss(stack: str, sums: RoutingSums) -> RoutingSums:
        if "log_policy" not in sums:
            return sums
        reward = log_probs
        if stack != "decoder":
            reward = rewards_of_segments(log_probs, target_segments, segments[stack])
        loss = policy_loss(sums["log_policy"], sums["baseline"], reward, segments[stack] > 0)
        return {name: sums[name] for name in sums if name not in ("log_policy", "baseline")} | {"policy_loss": loss}

    return {stack: [with_loss(stack, sums) for sums in runs] for stack, runs in routing.items()}


def policy_loss(
    log_policy: Float[Array, "N B L"],
    baseline: Float[Array, "N B L"],
    reward: Float[Array, "B L"],
    mask: Bool[Array, "B L"],
) -> Float[Array, "N"]:
    """`sum over tokens of -(R - b) log pi(a|x) + (R - b)^2 / 2`, R - b a constant in the first term; for each layer.

    The gradient of the first term is an unbiased estimate of that of `-E[R]`, whatever the baseline; the second makes
    the baseline the expected reward.
    """
    advantage = jax.lax.stop_gradient(reward)[None] - baseline
    loss = -jax.lax.stop_gradient(advantage) * log_policy + jnp.square(advantage) / 2
    return jnp.sum(loss, axis=(1, 2), where=mask[None])


def rewards_of_segments(
    log_probs: Float[Array, "B L"], target_segments: Int[Array, "B L"], segments: Int[Array, "B M"]
) -> Float[Array, "B M"]:
    """For each token, the mean log-probability of the targets of its own packed sequence; 0 for padding."""
    same = (segments[:, :, None] == target_segments[:, None, :]) & (segments > 0)[:, :, None]
    total = jnp.sum(jnp.broadcast_to(log_probs[:, None, :], same.shape), axis=-1, where=same)
    return total / jnp.maximum(jnp.sum(same, axis=-1, dtype=jnp.float32), 1)
