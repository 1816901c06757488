"""The parameters of a model: those that the optimiser trains, and those that move by a rule of their own."""

from functools import reduce
from typing import Any

import jax
from flax import nnx

from switchjax.models.inputs import Reports
from switchjax.parallel.sharding import is_variable, named_leaves


def is_trained(model: nnx.Module) -> dict[str, bool]:
    """True for each of `named_leaves(model)` that the optimiser trains; False for tables and averages, for instance."""
    trained = jax.tree.map(lambda variable: variable.get_metadata("trained", True), model, is_leaf=is_variable)
    return named_leaves(trained)


def count_trained(model: nnx.Module) -> int:
    """The number of values that the optimiser trains."""
    trained = is_trained(model)
    return sum(leaf.size for name, leaf in named_leaves(model).items() if trained[name])


def next_state(model: nnx.Module, reports: Reports) -> dict[str, jax.Array]:
    """The new values, by name, of leaves that are not trained but move after a step.

    `model` is the model before the step, and `reports` are summed over the step's micro-batches.
    """
    moved: dict[str, jax.Array] = {}
    for name, report in reports.items():
        if report.state_sums:
            layers = reduce(_part, name.split("/"), model)
            values = jax.vmap(lambda layer, sums: layer.next_state(sums))(layers, report.state_sums)
            moved |= {f"{name}/{leaf}": value for leaf, value in values.items()}
    return moved


def _part(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdecimal() else getattr(module, name)
