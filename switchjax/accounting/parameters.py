"""How many parameters a model learns, and how many of them a token meets."""

from typing import NamedTuple

import jax

from switchjax.accounting.weights import experts_per_token
from switchjax.config import Config
from switchjax.models.families import build
from switchjax.parallel.sharding import is_variable


class ParameterCounts(NamedTuple):
    """Parameters that the gradient trains, and those of them active for one token: K of E experts, everything else.

    Frozen tables, balancing biases and running averages are state of the routing and no parameters.
    """

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCounts:
    """Counts without allocating anything."""
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    selected = experts_per_token(config)
    total = active = 0
    for variable in jax.tree.leaves(model, is_leaf=is_variable):
        if not variable.get_metadata("trained", True):
            continue
        size = variable.size
        total += size
        axes = variable.get_metadata("axes")
        if "expert" in axes:
            size = size * selected // variable.shape[axes.index("expert")]
        active += size
    return ParameterCounts(total, active)
