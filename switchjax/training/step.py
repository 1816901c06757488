"""The train step: loss, gradient over micro-batches, update."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped

from switchjax.config import Config
from switchjax.models.families import FAMILIES
from switchjax.models.inputs import Reports, metrics_by_layer
from switchjax.models.model import Batch, Model
from switchjax.models.parameters import is_trained, next_state
from switchjax.moe.losses import summarize
from switchjax.parallel.sharding import constrain, leaves_for_update, partition_spec, with_leaves
from switchjax.training.objective import Objective, count_batch, objective, sum_over_targets
from switchjax.training.optimizer import make_schedule
from switchjax.training.state import StatePlan, TrainState

Metrics = dict[str, Any]

_SUMMARIES = (
    "router_entropy",
    "router_confidence",
    "fraction_tokens_dropped",
    "expert_load_top",
    "expert_load_bottom",
    "dead_experts",
)
"""Routing metrics with one number per layer."""


def train_step(
    state: TrainState, batch: Batch, config: Config, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """Takes one optimiser step on the global batch.

    Every loss is a sum over tokens divided by the token count of the whole batch, so the gradient does not depend on
    how the batch is divided into micro-batches or over devices.

    Returns:
        The next state, and metrics: scalars, those of `routing_metrics`, and `gradient_norms` by parameter name.
        `gradient_norm` and `parameter_norm` cover the parameters that the optimiser moves. `finite` is True if loss
        and gradient are finite; if they are not and `train.non_finite` is skip, only `step` of the state changes.
    """
    step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    counts = count_batch(state.model, batch)

    def contribution(model: Model, micro_batch: Batch, key: Array) -> tuple[Array, tuple[Objective, Reports]]:
        sums = sum_over_targets(config, model, micro_batch, key)
        terms = objective(config, sums, counts)
        return terms.total, (terms, sums.reports)

    gradient, (terms, reports) = _accumulate(contribution, state.model, batch, step_key, config)
    gradients, parameters = leaves_for_update(gradient), leaves_for_update(state.model)
    norms = {name: jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)))) for name, leaf in gradients.items()}
    trained = [name for name, moves in is_trained(state.model).items() if moves]
    gradient_norm = jnp.sqrt(sum(jnp.square(norms[name]) for name in trained))
    finite = jnp.isfinite(terms.total) & jnp.isfinite(gradient_norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, parameters)
    updated = (optax.apply_updates(parameters, updates) | next_state(state.model, reports), opt_state)
    if config.train.non_finite == "skip":
        # Not optax's `apply_if_finite`, whose counters would enter the state and every checkpoint.
        updated = optax.tree.where(finite, updated, (parameters, state.opt_state))
    parameters, opt_state = updated
    metrics = {
        "loss": terms.loss,
        "total_loss": terms.total,
        "z_loss": terms.z_loss,
        **terms.routing,
        **routing_metrics(reports),
        "learning_rate": make_schedule(config.optimizer, config.train.steps)(state.step),
        "gradient_norm": gradient_norm,
        "finite": finite,
        "parameter_norm": optax.tree.norm({name: parameters[name] for name in trained}),
        "tokens": sum(counts.tokens.values()),
        "gradient_norms": norms,
    }
    return TrainState(state.step + 1, with_leaves(state.model, parameters), opt_state), metrics


def lower_train_step(config: Config, plan: StatePlan, mesh: Mesh) -> jax.stages.Lowered:
    """The lowered train step for `mesh`, whose devices exist or are only described (`jax.experimental.topologies`).

    Once compiled, it takes a state, which it donates, and a global batch.
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


def _accumulate(
    contribution: Any, model: Model, batch: Batch, key: Array, config: Config
) -> tuple[Model, tuple[Objective, Reports]]:
    """The gradient, the objective and the reports, each summed over the micro-batches."""
    gradient_of, count = jax.grad(contribution, has_aux=True), config.train.accumulation_steps
    if count == 1:
        return gradient_of(model, batch, key)

    def deal(rows: Shaped[Array, "B ..."]) -> Shaped[Array, "count rows ..."]:
        # Blocks of rows that share routing groups go to the micro-batches in turn. So each shard divides the rows that
        # it has, and no row moves to another device.
        dealt = rows.reshape(-1, count, config.rows_per_group, *rows.shape[1:]).swapaxes(0, 1)
        return constrain(dealt.reshape(count, -1, *rows.shape[1:]), None, "batch")

    def add(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient_of(model, *inputs)), None

    micro_batches = jax.tree.map(deal, batch)
    first = {name: rows[0] for name, rows in micro_batches.items()}
    zeros = jax.tree.map(jnp.zeros_like, gradient_of(model, first, key))  # XLA keeps only the shapes
    total, _ = jax.lax.scan(add, zeros, (micro_batches, jax.random.split(key, count)))
    return total


def routing_metrics(reports: Reports) -> Metrics:
    """Routing metrics: the mean `NAME` over all layers with experts and `NAME_by_layer`; empty without such layers.

    Layers are in order, the encoder's first. `expert_load` is [layers, E], padded with 0 for layers with fewer experts.
    """
    layers = [summarize(metrics) for rows in metrics_by_layer(reports).values() for metrics in rows]
    if not layers:
        return {}
    by_layer = {name: jnp.stack([getattr(summary, name) for summary in layers]) for name in _SUMMARIES}
    most = max(summary.expert_load.shape[-1] for summary in layers)
    return {
        **{name: jnp.mean(values) for name, values in by_layer.items()},
        **{f"{name}_by_layer": values for name, values in by_layer.items()},
        "expert_load": jnp.stack([jnp.pad(row.expert_load, (0, most - row.expert_load.shape[0])) for row in layers]),
    }
