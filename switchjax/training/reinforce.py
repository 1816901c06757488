"""REINFORCE for routers whose choice is an action (Clark et al. 2022; Williams 1992)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchjax.models.encoder_decoder import Batch
from switchjax.moe.layer import RoutingSums


def with_policy_losses(
    routing: dict[str, RoutingSums], log_probs: Float[Array, "B L"], batch: Batch
) -> dict[str, RoutingSums]:
    """Routing sums in which `policy_loss` takes the place of `log_policy` and `baseline`, in stacks that have these.

    Args:
        routing: of each stack, the two per token and layer [layers, B, L].
        log_probs: of the decoder's targets: the reward.
        batch: what the model was given.
    """
    result = {}
    for stack, sums in routing.items():
        segments = batch[f"{stack}_segments"]
        if "log_policy" in sums:
            reward = log_probs
            if stack == "encoder":
                reward = rewards_of_segments(log_probs, batch["decoder_segments"], segments)
            loss = policy_loss(sums["log_policy"], sums["baseline"], reward, segments > 0)
            sums = {name: sums[name] for name in sums if name not in ("log_policy", "baseline")} | {"policy_loss": loss}
        result[stack] = sums
    return result


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
