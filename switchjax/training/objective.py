"""The objective: what training minimises. Evaluation and the parity tests with transformers ask the same functions.

Everything is a sum over tokens, divided once by the counts of the whole batch; so micro-batches, meshes and padding
change nothing.
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
    """What the model makes of a batch, as sums over its targets."""

    nll: Float[Array, ""]
    """Negative log-likelihood, nats."""
    z_loss: Float[Array, ""]
    """`log(Z)^2`, Z the sum of a target's exponentiated logits."""
    correct: Int[Array, ""]
    """Targets that are the most probable."""
    reports: Reports
    """Of the layers with experts; losses that depend on rewards are among their losses."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """What sums are divided by: the tokens of the whole batch."""

    targets: Int[Array, ""]
    tokens: dict[str, Int[Array, ""]]
    """Of each stack, by which its losses of routing are divided."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objective:
    """The terms of the objective."""

    loss: Float[Array, ""]
    """Mean negative log-likelihood of a target, nats."""
    z_loss: Float[Array, ""]
    """Mean `log(Z)^2`, before its weight."""
    routing: dict[str, Float[Array, ""]]
    """Each loss of routing, a mean over a layer's tokens and over layers, before its weight."""
    total: Float[Array, ""]
    """What is minimised: all terms, weighted."""


def objective(config: Config, sums: Sums, counts: Counts) -> Objective:
    """`loss + w_z z_loss + sum_i w_i routing_i`; of a micro-batch, its contribution to that of the whole batch.

    Args:
        config: has the weights: `train.z_loss_weight`, the router's own and `moe.loss_weights`.
        sums: of the batch or a micro-batch.
        counts: of the whole batch.
    """
    targets = jnp.maximum(counts.targets.astype(jnp.float32), 1)
    loss, z_loss = sums.nll / targets, sums.z_loss / targets
    with_losses = {name: report for name, report in sums.reports.items() if report.losses}
    num_layers = sum(len(report.layers) for report in with_losses.values())
    weights = loss_weights(config.moe) if with_losses else {}
    routing: dict[str, Float[Array, ""]] = {}
    auxiliary = jnp.zeros(())
    for name, report in with_losses.items():
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
    """Applies the model to a batch, with its kernels in the compute dtype and its sharded parameters whole.

    Args:
        config: of the run.
        model: as it is kept.
        batch: a batch or a micro-batch.
        key: for dropout and routing noise; None in evaluation.
    """
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
    """The log-probability of each target (nats), and log(Z), in float32."""
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
    """Reports in which losses that depend on rewards (`Router.reward_losses`) take the place of token values.

    Args:
        config: names the router.
        reports: of all layers with experts.
        log_probs: of the targets. A decoder's token is rewarded by that of its own target, an encoder's by the mean
            over the targets of its packed sequence.
        target_segments: the segments of the targets.
        segments: of each stack's tokens.
    """

    def rewarded(stack: str, report: RoutingReport) -> RoutingReport:
        if not report.token_values:
            return report
        reward_losses = router_of(config.moe).reward_losses
        assert reward_losses is not None, "only a router with reward_losses has token values"
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
