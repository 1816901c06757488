"""Stacks modules of one shape along a leading axis: layers for `lax.scan`, experts for `vmap`."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Key, PRNGKeyArray

from switchjax.parallel.sharding import is_variable

M = TypeVar("M", bound=nnx.Module)


def stack(make: Callable[[PRNGKeyArray], M], keys: Key[Array, "N"], axis: str) -> M:
    """One module with the parameters of `make(key)` for every key, stacked along a new first axis named `axis`."""
    module = jax.vmap(make)(keys)
    for variable in jax.tree.leaves(module, is_leaf=is_variable):
        variable.set_metadata(axes=(axis, *variable.get_metadata("axes")))
    return module
