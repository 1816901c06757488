"""Finds the matrix products of a traced program: the cost of each, and the weight that it multiplies by."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.extend as jex


class Matmul(NamedTuple):
    """A `dot_general` that runs `times` times."""

    left: jax.core.ShapedArray
    right: jax.core.ShapedArray
    dimension_numbers: Any
    result: Any
    times: int
    weight: int | None
    """Number of the leaf of the program's first argument that is one of the operands, or None."""

    @property
    def flops(self) -> int:
        """FLOPs of all runs; a multiplication and an addition count as two."""
        (_, contracted), (_, batch) = self.dimension_numbers
        free = [size for axis, size in enumerate(self.right.shape) if axis not in (*contracted, *batch)]
        return 2 * self.times * prod(self.left.shape) * prod(free)


class _Source(NamedTuple):
    """The origin of a value that does not depend on the data."""

    looked_up: bool
    """The value holds rows of a weight, chosen by indices. In a product with another weight, they are its vectors."""
    weight: int
    """Number of the weight; -1 for a constant."""


_CONSTANT = _Source(False, -1)


def matmuls(function: Callable[..., Any], *arguments: Any) -> list[Matmul]:
    """The matrix products of `function(*arguments)`; `arguments` are arrays or shapes, and the first holds the weights.

    The `times` of a product in the body of a loop count every iteration.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    weights = [_Source(False, number) for number in range(len(jax.tree.leaves(arguments[0])))]
    return _walk(jaxpr, [*weights, *[None] * (len(jaxpr.invars) - len(weights))], 1)[0]


def _walk(
    jaxpr: jex.core.Jaxpr, sources: Sequence[_Source | None], times: int
) -> tuple[list[Matmul], list[_Source | None]]:
    """The products of a jaxpr with these sources of its inputs (None: data), and the sources of its outputs."""
    known = {var: source for var, source in zip(jaxpr.invars, sources, strict=True) if source}
    found: list[Matmul] = []

    def sources_of(values: Sequence[jex.core.Var | jex.core.Literal]) -> list[_Source | None]:
        return [known.get(value) if isinstance(value, jex.core.Var) else _CONSTANT for value in values]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, sources_of(equation.invars)
        outputs: list[_Source | None] = []
        if name in ("dot_general", "ragged_dot_general"):
            found += _read(equation, inputs, times)
        elif name == "pallas_call":
            pass  # its body computes one tile only
        elif bodies := _bodies(equation):
            repeats = equation.params["length"] if name == "scan" else 1
            walked = [_walk(body, _enter(equation, body, inputs), times * repeats) for body in bodies]
            if name == "cond":  # costs as much as its most expensive branch
                walked = [max(walked, key=lambda branch: sum(matmul.flops for matmul in branch[0]))]
            found += [matmul for inner, _ in walked for matmul in inner]
            outputs = walked[0][1] if name not in ("scan", "while", "cond") else []
        elif name in ("gather", "dynamic_slice"):
            outputs = [inputs[0] and inputs[0]._replace(looked_up=True)]
        elif all(inputs):  # a weight in another dtype or layout, scaled or normalised, stays a weight
            outputs = [max((source for source in inputs if source), default=_CONSTANT)] * len(equation.outvars)
        known |= {var: source for var, source in zip(equation.outvars, outputs, strict=False) if source}
    return found, sources_of(jaxpr.outvars)


def _read(equation: jex.core.JaxprEqn, inputs: list[_Source | None], times: int) -> list[Matmul]:
    left, right = (value.aval for value in equation.invars[:2])
    assert isinstance(left, jax.core.ShapedArray)
    assert isinstance(right, jax.core.ShapedArray)
    if equation.primitive.name == "dot_general":
        dimensions = equation.params["dimension_numbers"]
        if not dimensions[0][0]:
            return []  # an outer product: it sums over nothing
    else:  # each row meets one group's matrix, so the cost is that of all rows times one matrix
        right, dimensions = right.update(shape=right.shape[1:]), (((1,), (0,)), ((), ()))
    weight = min((source for source in inputs[:2] if source and source.weight >= 0), default=_CONSTANT).weight
    result = equation.params["preferred_element_type"]
    return [Matmul(left, right, dimensions, result, times, weight if weight >= 0 else None)]


def _bodies(equation: jex.core.JaxprEqn) -> list[jex.core.Jaxpr]:
    closed, opened = jex.core.ClosedJaxpr, jex.core.Jaxpr
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, closed | opened))
    return [leaf.jaxpr if isinstance(leaf, closed) else leaf for leaf in leaves if isinstance(leaf, closed | opened)]


def _enter(equation: jex.core.JaxprEqn, body: jex.core.Jaxpr, inputs: list[_Source | None]) -> list[_Source | None]:
    """The sources of a body's inputs: the last inputs of its equation, where a loop's carried values count as data."""
    if equation.primitive.name == "scan":
        first, carried = equation.params["num_consts"], equation.params["num_carry"]
        inputs = [*inputs[:first], *[None] * carried, *inputs[first + carried :]]
    elif equation.primitive.name == "while":
        inputs = [None] * len(inputs)
    return inputs[len(inputs) - len(body.invars) :]
