"""The products of arrays in a program, as a program of their own: what it would cost if nothing else did."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jaxtyping import Array, Float


class Product(NamedTuple):
    """A `dot_general` that runs `times` times."""

    left: jax.core.ShapedArray
    right: jax.core.ShapedArray
    dimension_numbers: Any
    result: Any
    times: int


def products(function: Callable[..., Any], *arguments: Any) -> list[Product]:
    """Those of `function(*arguments)`, the bodies of its loops as often as these run."""
    return list(_products(jax.make_jaxpr(function)(*arguments).jaxpr, 1))


def _products(jaxpr: jex.core.Jaxpr, times: int) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (value.aval for value in equation.invars)
            assert isinstance(left, jax.core.ShapedArray)
            assert isinstance(right, jax.core.ShapedArray)
            yield Product(
                left,
                right,
                equation.params["dimension_numbers"],
                equation.params["preferred_element_type"],
                times,
            )
        repeats = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if isinstance(inner, jex.core.ClosedJaxpr):
                yield from _products(inner.jaxpr, repeats)
            elif isinstance(inner, jex.core.Jaxpr):
                yield from _products(inner, repeats)


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, jex.core.Jaxpr | jex.core.ClosedJaxpr)


def products_alone(found: list[Product], repeats: int) -> Callable[[], Float[Array, ""]]:
    """Multiplies arrays of their shapes, `repeats` times over; each of the times of a product has arrays of its own."""
    operands = [
        tuple(jnp.ones((product.times, *side.shape), side.dtype) for side in (product.left, product.right))
        for product in found
    ]

    @jax.jit
    def run(operands: list[tuple[Array, Array]]) -> Float[Array, ""]:
        def once(_: Array, carry: Float[Array, ""]) -> Float[Array, ""]:
            for product, sides in zip(found, operands, strict=True):
                carry, _ = jax.lax.scan(partial(_multiply, product), carry, sides)
            return carry

        return jax.lax.fori_loop(0, repeats, once, jnp.ones(()))

    return lambda: run(operands)


def _multiply(
    product: Product, carry: Float[Array, ""], sides: tuple[Array, Array]
) -> tuple[Float[Array, ""], Float[Array, "0"]]:
    left, right = sides
    left = left * carry.astype(left.dtype)  # so that no product is done once for all
    y = jax.lax.dot_general(left, right, product.dimension_numbers, preferred_element_type=product.result)
    # One entry of it, and not a sum, which would take time of its own; the barrier keeps the others.
    first = jax.lax.optimization_barrier(y)[(0,) * y.ndim]
    return carry + 0 * first.astype(jnp.float32), jnp.zeros(0)
