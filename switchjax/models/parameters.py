"""The parameters of a model: which of them the optimiser trains."""

import jax
from flax import nnx

from switchjax.parallel.sharding import is_variable, named_leaves

GRADIENT = "gradient"
"""The update rule of parameters that say nothing else: the optimiser proper."""


def update_rules(model: nnx.Module) -> dict[str, str]:
    """How training changes each parameter of `named_leaves(model)`: the `update` of its metadata.

    gradient: the optimiser. frozen: never. sign: `p <- p - rate sign(g)`, without schedule (DeepSeek-V3's bias).
    average: `p <- p - 0.1 g`, an exponential moving average where g is p less the batch's statistic.
    """
    rules = jax.tree.map(lambda variable: variable.get_metadata("update", GRADIENT), model, is_leaf=is_variable)
    return named_leaves(rules)


def count_trained(model: nnx.Module) -> int:
    """How many numbers the optimiser moves: tables, balancing biases and averages are state and no parameters."""
    rules = update_rules(model)
    return sum(leaf.size for name, leaf in named_leaves(model).items() if rules[name] == GRADIENT)
