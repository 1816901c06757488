"""The train step: loss, gradient over micro-batches, update."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from switchjax.config import Config
from switchjax.models.families import FAMILIES
from switchjax.models.layers import cast_kernels
from switchjax.models.model import Batch, Model, Routing
from switchjax.models.parameters import GRADIENT, update_rules
from switchjax.moe.layer import RoutingSums
from switchjax.moe.losses import summarize
from switchjax.parallel.sharding import constrain, gather, leaves_for_update, partition_spec, with_leaves
from switchjax.training.optimizer import make_schedule
from switchjax.training.reinforce import with_policy_losses
from switchjax.training.state import StatePlan, TrainState

Metrics = dict[str, Any]

UPDATE_LOSSES = ("bias_loss", "average_loss")
"""Losses of value 0 whose gradient is what the update rule of a parameter asks for (`update_rules`): already a mean or
of no account but for its sign, so neither weighted nor divided by layers or tokens."""


def target_log_probs(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """The log-probability of each target (nats), and log(Z), in float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z, log_z


def token_losses(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the tokens of `mask` of the negative log-likelihood (nats) and of `log(Z)^2`, the z-loss."""
    log_probs, log_z = target_log_probs(logits, targets)
    return -jnp.sum(log_probs, where=mask), jnp.sum(jnp.square(log_z), where=mask)


def train_step(
    state: TrainState, batch: Batch, config: Config, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One update.

    Every loss is a sum over tokens divided by the token count of the whole batch, so the gradient is the same however
    the batch is divided into micro-batches or over devices.

    Args:
        state: donated by the caller.
        batch: the global batch.
        config: of the run.
        optimizer: the one whose state `state` holds.

    Returns:
        The next state, and metrics: scalars, `expert_load` [MoE layers, E] with the encoder's layers first, and
        `gradient_norms` by the names of parameters. `gradient_norm` and `parameter_norm` are of those that the
        optimiser moves. `finite` is whether loss and gradient are; where they are not, and `train.non_finite` is skip,
        only the step of the state is another.
    """
    step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    num_targets = jnp.maximum(jnp.sum(state.model.targets(batch)[1] > 0, dtype=jnp.float32), 1)
    routed = {stack: jnp.sum(segments > 0) for stack, segments in state.model.segments(batch).items()}

    def contribution(model: Model, micro_batch: Batch, key: Array) -> tuple[Array, Metrics]:
        logits, routing = gather(cast_kernels(model, config.model.dtype))(micro_batch, key)
        targets, segments = model.targets(micro_batch)
        log_probs, _ = target_log_probs(logits, targets)
        routing = with_policy_losses(routing, log_probs, segments, model.segments(micro_batch))
        nll, z_loss = token_losses(logits, targets, segments > 0)
        loss, z_loss = nll / num_targets, z_loss / num_targets
        total = loss + config.train.z_loss_weight * z_loss + _auxiliary_loss(config, routing, routed)
        return total, {"loss": loss, "z_loss": z_loss, "total_loss": total, "routing": routing}

    gradient, sums = _accumulate(contribution, state.model, batch, step_key, config)
    gradients, parameters = leaves_for_update(gradient), leaves_for_update(state.model)
    norms = {name: jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)))) for name, leaf in gradients.items()}
    trained = [name for name, rule in update_rules(state.model).items() if rule == GRADIENT]
    gradient_norm = jnp.sqrt(sum(jnp.square(norms[name]) for name in trained))
    finite = jnp.isfinite(sums["total_loss"]) & jnp.isfinite(gradient_norm + sum(norms.values()))
    updates, opt_state = optimizer.update(gradients, state.opt_state, parameters)
    updated = (optax.apply_updates(parameters, updates), opt_state)
    if config.train.non_finite == "skip":
        # Not optax's `apply_if_finite`: its counters would be part of the state, and of every checkpoint.
        updated = optax.tree.where(finite, updated, (parameters, state.opt_state))
    parameters, opt_state = updated
    metrics = {
        **{name: sums[name] for name in ("loss", "total_loss", "z_loss")},
        **routing_metrics([run for stack in routed for run in sums["routing"][stack]]),
        "learning_rate": make_schedule(config.optimizer, config.train.steps)(state.step),
        "gradient_norm": gradient_norm,
        "finite": finite,
        "parameter_norm": optax.tree.norm({name: parameters[name] for name in trained}),
        "tokens": sum(routed.values()),
        "gradient_norms": norms,
    }
    return TrainState(state.step + 1, with_leaves(state.model, parameters), opt_state), metrics


def lower_train_step(config: Config, plan: StatePlan, mesh: Mesh) -> jax.stages.Lowered:
    """The train step for `mesh`, of devices that are here or (`jax.experimental.topologies`) only described.

    Compiled, it takes a state, which it donates, and a global batch.
    """
    rows = NamedSharding(mesh, partition_spec("batch"))
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
        for name, array in FAMILIES[config.model.family].batch_shapes(config).items()
    }
    step = jax.jit(
        partial(train_step, config=config, optimizer=plan.optimizer),
        in_shardings=(plan.shardings, dict.fromkeys(batch, rows)),
        out_shardings=(plan.shardings, None),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return step.lower(plan.shapes, batch)


def _auxiliary_loss(config: Config, routing: Routing, tokens: dict[str, Int[Array, ""]]) -> Float[Array, ""]:
    """The losses of routing, weighted and averaged over MoE layers, and the updates that go by as losses."""
    layers = sum(len(next(iter(sums.values()))) for runs in routing.values() for sums in runs)
    total = jnp.zeros(())
    for stack, runs in routing.items():
        count = jnp.maximum(tokens[stack], 1).astype(jnp.float32)
        for sums in runs:
            for name in sums:
                if name in UPDATE_LOSSES:
                    total += jnp.sum(sums[name]) / config.train.accumulation_steps
                elif name.endswith("_loss"):
                    total += getattr(config.moe, f"{name}_weight") / layers * jnp.sum(sums[name]) / count
    return total


def _accumulate(contribution: Any, model: Model, batch: Batch, key: Array, config: Config) -> tuple[Model, Metrics]:
    """Gradient and sums over the micro-batches."""
    gradient_of, count = jax.grad(contribution, has_aux=True), config.train.accumulation_steps
    if count == 1:
        return gradient_of(model, batch, key)
    micro_batches = {name: _deal(rows, count, config.rows_per_group) for name, rows in batch.items()}

    def add(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient_of(model, *inputs)), None

    first = {name: rows[0] for name, rows in micro_batches.items()}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient_of, model, first, key))
    total, _ = jax.lax.scan(add, zeros, (micro_batches, jax.random.split(key, count)))
    return total


def _deal(rows: Shaped[Array, "B ..."], count: int, together: int) -> Shaped[Array, "count rows ..."]:
    """`count` micro-batches of every `count`-th `together` rows: each shard divides the rows that it has, no group."""
    dealt = rows.reshape(-1, count, together, *rows.shape[1:]).swapaxes(0, 1)
    return constrain(dealt.reshape(count, -1, *rows.shape[1:]), None, "batch")


def routing_metrics(runs: list[RoutingSums]) -> Metrics:
    """Means over all MoE layers, and `expert_load` of each layer [layers, E]; empty without routers.

    Where layers have different numbers of experts, the load of those that a layer has not is 0.
    """
    summaries = [summarize(sums) for sums in runs if "tokens" in sums]
    if not summaries:
        return {}
    most = max(summary["expert_load"].shape[-1] for summary in summaries)
    metrics = {}
    for name in summaries[0]:
        if name == "expert_load":
            loads = [summary[name] for summary in summaries]
            padded = [jnp.pad(load, ((0, 0), (0, most - load.shape[-1]))) for load in loads]
            metrics[name] = jnp.concatenate(padded)
        elif name not in UPDATE_LOSSES:
            metrics[name] = jnp.mean(jnp.concatenate([summary[name] for summary in summaries]))
    return metrics
