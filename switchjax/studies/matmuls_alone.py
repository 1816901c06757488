"""The matrix products of a program as a program of their own: what it would take if nothing else did."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from switchjax.accounting.matmuls import Matmul


def matmuls_alone(found: list[Matmul], repeats: int) -> Callable[[], Float[Array, ""]]:
    """Multiplies arrays of their shapes, `repeats` times over; each of the times of a product has arrays of its own."""
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
    left = left * carry.astype(left.dtype)  # so that no product is done once for all
    y = jax.lax.dot_general(left, right, matmul.dimension_numbers, preferred_element_type=matmul.result)
    # One entry of it, and not a sum, which would take time of its own; the barrier keeps the others.
    first = jax.lax.optimization_barrier(y)[(0,) * y.ndim]
    return carry + 0 * first.astype(jnp.float32), jnp.zeros(0)
