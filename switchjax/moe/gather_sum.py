"""The one primitive under dispatch and combine: a sum of gathers whose transpose is a sum of gathers.

It is written by hand because JAX derives a scatter-add from a gather, and knows no way to be told the inverse index.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def gather_sum(rows: Float[Array, "N D"], index: Int[Array, "M K"], inverse: Int[Array, "N J"]) -> Float[Array, "M D"]:
    """`out[m] = sum_k rows[index[m, k]]`, where an index of N counts as a row of zeros.

    JAX's derivative of a gather is a scatter, slow on every accelerator; with the inverse, which no library function
    takes, it is a gather too.

    Args:
        rows: what is gathered.
        index: which rows each output sums.
        inverse: which outputs each row takes part in, M for none.
    """
    del inverse
    return _gather_sum(rows, index)


def _gather_sum(rows: Array, index: Array) -> Array:
    gathered = [jnp.take(rows, index[:, k], axis=0, mode="fill", fill_value=0) for k in range(index.shape[1])]
    return sum(gathered[1:], start=gathered[0])


def _forward(rows: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gather_sum(rows, index), (index, inverse)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    index, inverse = residuals
    # Integers have no gradient; JAX asks for arrays of float0 in its place.
    return (
        _gather_sum(gradient, inverse),
        np.zeros(index.shape, jax.dtypes.float0),
        np.zeros(inverse.shape, jax.dtypes.float0),
    )


gather_sum.defvjp(_forward, _backward)
