"""A program that computes only the matrix products of another: the least time that the other can take."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from switchjax.accounting.matmuls import Matmul


def matmuls_alone(found: list[Matmul], repeats: int) -> Callable[[], Float[Array, ""]]:
    """A function that computes all products `repeats` times, on arrays of their shapes.

    A product in a loop has different arrays in each turn, as in the original program.
    """
    operands = [
        tuple(jnp.ones((matmul.times, *side.shape), side.dtype) for side in (matmul.left, matmul.right))
        for matmul in found
    ]

    @jax.jit
    def run(operands: list[tuple[Array, Array]]) -> Float[Array, ""]:
        def once(_: Array, carry: Float[Array, ""]) -> Float[Array, ""]:
            for matmul, sides in zip(found, operands, strict=True):
                carry, _ = jax.lax.scan(partial(_multiply, matmul), carry, sides)
            return carry

        return jax.lax.fori_loop(0, repeats, once, jnp.ones(()))

    return lambda: run(operands)


def _multiply(
    matmul: Matmul, carry: Float[Array, ""], sides: tuple[Array, Array]
) -> tuple[Float[Array, ""], Float[Array, "0"]]:
    left, right = sides
    left = left * carry.astype(left.dtype)  # otherwise XLA computes each product only once
    y = jax.lax.dot_general(left, right, matmul.dimension_numbers, preferred_element_type=matmul.result)
    # One entry, as a sum would take time of its own. The barrier stops XLA from computing only that entry.
    first = jax.lax.optimization_barrier(y)[(0,) * y.ndim]
    return carry + 0 * first.astype(jnp.float32), jnp.zeros(0)
