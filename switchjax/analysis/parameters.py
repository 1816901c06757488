"""How many parameters a model has, and how many a token meets."""

from typing import NamedTuple

import jax

from switchjax.config import Config
from switchjax.models.encoder_decoder import build
from switchjax.parallel.sharding import is_variable


class ParameterCounts(NamedTuple):
    """All parameters, and those active for one token: K of E experts, everything else."""

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCounts:
    """Counts without allocating anything."""
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    total = active = 0
    for variable in jax.tree.leaves(model, is_leaf=is_variable):
        size = variable.size
        total += size
        if "expert" in variable.get_metadata("axes"):
            size = size * config.moe.num_selected_experts // config.moe.num_experts
        active += size
    return ParameterCounts(total, active)
