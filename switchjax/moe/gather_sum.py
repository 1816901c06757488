"""The one primitive under dispatch and combine: a sum of gathers whose transpose is a sum of gathers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def gather_sum(rows: Float[Array, "N D"], index: Int[Array, "M K"], inverse: Int[Array, "N J"]) -> Float[Array, "M D"]:
    """`out[m] = sum_k rows[index[m, k]]`, where an index of N counts as a row of zeros.

    Args:
        rows: the rows to gather.
        index: the rows that each output sums.
        inverse: the outputs that each row is part of; M for none.
    """
    gathered = [jnp.take(rows, index[:, k], axis=0, mode="fill", fill_value=0) for k in range(index.shape[1])]
    return sum(gathered[1:], start=gathered[0])


# JAX derives a scatter-add from a gather, which is slow on every accelerator. Given the inverse index, which no library
# function accepts, the derivative is a gather too: the same sum with the two indices swapped.
gather_sum.defvjp(
    lambda rows, index, inverse: (gather_sum(rows, index, inverse), (index, inverse)),
    lambda indices, gradient: (gather_sum(gradient, indices[1], indices[0]), None, None),
)
