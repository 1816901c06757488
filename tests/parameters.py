"""Models with plain random parameters: compiling the initialisers would take longer than the tests."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

M = TypeVar("M")


def random_parameters(make: Callable[[], M], seed: int = 0) -> M:
    """What `make` builds, each parameter normal with standard deviation 0.25 (norms' scales and variances around 1)."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean = 1.0 if ".scale" in name or ".norm_variance" in name else 0.0
        return jnp.asarray(mean + 0.25 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(make))
