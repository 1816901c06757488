"""The train state: its shapes, its layout over a mesh, and its creation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchjax.config import Config
from switchjax.models.families import build, with_all_options
from switchjax.models.model import Model
from switchjax.parallel.sharding import named_leaves, optimizer_shardings, parameter_shardings
from switchjax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Number of steps taken, parameters and optimiser state; random keys follow from the seed and `step`.

    `StatePlan` has the same tree with shapes or shardings in place of the arrays, hence `Any`.
    """

    step: Any  # Int[Array, ""]
    model: Model
    opt_state: Any


@dataclass(frozen=True)
class StatePlan:
    """Shapes and shardings of a state that need not exist yet, and its optimiser."""

    config: Config
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState

    def create(self) -> TrainState:
        """A fresh state. Each device makes its own shards, so no device ever holds a whole parameter."""

        def initialize() -> TrainState:
            model = build(self.config, jax.random.key(self.config.train.seed))
            return TrainState(jnp.zeros((), jnp.int32), model, self.optimizer.init(named_leaves(model)))

        return jax.jit(initialize, out_shardings=self.shardings)()


def plan_state(config: Config, mesh: Mesh) -> StatePlan:
    """The plan of the state that `config` describes, laid out over `mesh`; allocates nothing."""
    config = with_all_options(config)
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    optimizer = make_optimizer(config, model)
    opt_state = jax.eval_shape(optimizer.init, named_leaves(model))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return StatePlan(
        config,
        optimizer,
        shapes=TrainState(step, model, opt_state),
        shardings=TrainState(
            NamedSharding(mesh, PartitionSpec()),
            parameter_shardings(model, mesh),
            optimizer_shardings(opt_state, model, mesh),
        ),
    )
