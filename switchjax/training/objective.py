"""The objective that training minimises; evaluation and the parity tests with transformers use the same functions.

Each term is a sum over tokens divided by a count over the whole batch, so micro-batches, meshes and padding change
nothing.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.inputs import Reports, stack_of
from switchjax.models.layers import cast_kernels
from switchjax.models.model import Batch, Model
from switchjax.moe.routers import loss_weights, router_of
from switchjax.moe.routing import RoutingReport
from switchjax.parallel.sharding import unshard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over the targets of a batch or a micro-batch."""

    nll: Float[Array, ""]
    """Negative log-likelihood, in nats."""
    z_loss: Float[Array, ""]
    """`log(Z)^2`, where Z is the sum of `exp(logits)` of a target."""
    correct: Int[Array, ""]
    """Targets to which the model gives the highest probability."""
    reports: Reports
    """Reports of the layers with experts, which include the losses that depend on rewards."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """Numbers of tokens in the whole batch, by which sums are divided."""

    targets: Int[Array, ""]
    tokens: dict[str, Int[Array, ""]]
    """Real tokens of each stack; its routing losses are divided by them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objective:
    """The terms of the objective."""

    loss: Float[Array, ""]
    """Mean negative log-likelihood of a target, in nats."""
    z_loss: Float[Array, ""]
    """Mean `log(Z)^2`, before its weight."""
    routing: dict[str, Float[Array, ""]]
    """Each routing loss, a mean over tokens and layers, before its weight."""
    total: Float[Array, ""]
    """The weighted sum of all terms, which training minimises."""


def objective(config: Config, sums: Sums, counts: Counts) -> Objective:
    """`loss + w_z z_loss + sum_i w_i routing_i`; for a micro-batch, its contribution to the whole batch's objective.

    Args:
        config: holds the weights: `train.z_loss_weight`, the router's defaults and `moe.loss_weights`.
        sums: sums over the batch or a micro-batch.
        counts: counts of the whole batch.
    """
    targets = jnp.maximum(counts.targets.astype(jnp.float32), 1)
    loss, z_loss = sums.nll / targets, sums.z_loss / targets
    reports = {name: report for name, report in sums.reports.items() if report.losses}
    num_layers = sum(len(report.layers) for report in reports.values())
    weights = loss_weights(config.moe) if reports else {}
    routing: dict[str, Float[Array, ""]] = {}
    auxiliary = jnp.zeros(())
    for name, report in reports.items():
        tokens = jnp.maximum(counts.tokens[stack_of(name)], 1).astype(jnp.float32)
        for kind, values in report.losses.items():
            routing[kind] = routing.get(kind, jnp.zeros(())) + jnp.sum(values) / tokens / num_layers
            auxiliary += weights[kind] / num_layers * jnp.sum(values) / tokens
    return Objective(loss, z_loss, routing, loss + config.train.z_loss_weight * z_loss + auxiliary)


def count_batch(model: Model, batch: Batch) -> Counts:
    """The counts of a batch."""
    return Counts(
        jnp.sum(model.targets(batch)[1] > 0),
        {stack: jnp.sum(segments > 0) for stack, segments in model.segments(batch).items()},
    )


def sum_over_targets(config: Config, model: Model, batch: Batch, key: PRNGKeyArray | None) -> Sums:
    """Applies the model to a batch or a micro-batch; `key` seeds dropout and routing noise, None in evaluation."""
    # Kernels are cast before the all-gather, which then moves the bytes of the compute dtype.
    logits, reports = unshard(cast_kernels(model, config.model.dtype))(batch, key)
    targets, segments = model.targets(batch)
    mask = segments > 0
    log_probs, log_z = target_log_probs(logits, targets)
    return Sums(
        nll=-jnp.sum(log_probs, where=mask),
        z_loss=jnp.sum(jnp.square(log_z), where=mask),
        correct=jnp.sum(jnp.argmax(logits, axis=-1) == targets, where=mask),
        reports=with_reward_losses(config, reports, log_probs, segments, model.segments(batch)),
    )


def target_log_probs(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """The log-probability of each target, in nats, and log(Z), both in float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z, log_z


def with_reward_losses(
    config: Config,
    reports: Reports,
    log_probs: Float[Array, "B T"],
    target_segments: Int[Array, "B T"],
    segments: dict[str, Int[Array, "B _"]],
) -> Reports:
    """Reports with the losses that depend on rewards (`Router.reward_losses`) in place of their token values.

    The reward of a decoder's token is the log-probability of its own target. The reward of an encoder's token is the
    mean log-probability of the targets of its packed sequence.

    Args:
        config: names the router.
        reports: reports of all layers with experts.
        log_probs: log-probabilities of the targets.
        target_segments: segments of the targets.
        segments: stack -> segments of its tokens.
    """

    def rewarded(stack: str, report: RoutingReport) -> RoutingReport:
        if not report.token_values:
            return report
        reward_losses = router_of(config.moe).reward_losses
        assert reward_losses is not None, "only a router with reward_losses returns token values"
        reward = log_probs
        if stack != "decoder":
            reward = rewards_of_segments(log_probs, target_segments, segments[stack])
        losses = report.losses | reward_losses(report.token_values, reward, segments[stack] > 0)
        return replace(report, losses=losses, token_values={})

    return {name: rewarded(stack_of(name), report) for name, report in reports.items()}


def rewards_of_segments(
    log_probs: Float[Array, "B L"], target_segments: Int[Array, "B L"], segments: Int[Array, "B M"]
) -> Float[Array, "B M"]:
    """For each token, the mean log-probability of the targets of its own packed sequence; 0 for padding."""
    same = (segments[:, :, None] == target_segments[:, None, :]) & (segments > 0)[:, :, None]
    total = jnp.sum(jnp.broadcast_to(log_probs[:, None, :], same.shape), axis=-1, where=same)
    return total / jnp.maximum(jnp.sum(same, axis=-1, dtype=jnp.float32), 1)
