"""The matrix products of a traced program: what each costs, and which weight it multiplies by."""

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
    """The leaf of the program's first argument that is one of the operands; None if none is."""

    @property
    def flops(self) -> int:
        """FLOPs of all times, two for a multiplication and addition."""
        (_, contracted), (_, batch) = self.dimension_numbers
        free = [size for axis, size in enumerate(self.right.shape) if axis not in (*contracted, *batch)]
        return 2 * self.times * prod(self.left.shape) * prod(free)


class _Source(NamedTuple):
    """What a value that does not depend on the data is computed from."""

    looked_up: bool
    """It holds rows of a weight, chosen by indices: beside another weight, these are the vectors that it multiplies."""
    weight: int
    """The weight; -1 for a constant."""


_CONSTANT = _Source(False, -1)


def matmuls(function: Callable[..., Any], *arguments: Any) -> list[Matmul]:
    """The matrix products of `function(*arguments)`; those in the body of a loop run as often as the loop.

    Args:
        function: anything that JAX traces.
        arguments: arrays or their shapes; the first holds the weights.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    weights = [_Source(False, number) for number in range(len(jax.tree.leaves(arguments[0])))]
    return _walk(jaxpr, [*weights, *[None] * (len(jaxpr.invars) - len(weights))], 1)[0]


def _walk(
    jaxpr: jex.core.Jaxpr, sources: Sequence[_Source | None], times: int
) -> tuple[list[Matmul], list[_Source | None]]:
    """The products of a jaxpr whose inputs have these sources (None: data), and the sources of its outputs."""
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
            pass  # its body is what a kernel does with one tile
        elif bodies := _bodies(equation):
            repeats = equation.params["length"] if name == "scan" else 1
            walked = [_walk(body, _enter(equation, body, inputs), times * repeats) for body in bodies]
            if name == "cond":  # which costs as much as its dearest branch
                walked = [max(walked, key=lambda branch: sum(matmul.flops for matmul in branch[0]))]
            found += [matmul for inner, _ in walked for matmul in inner]
            outputs = walked[0][1] if name not in ("scan", "while", "cond") else []
        elif name in ("gather", "dynamic_slice"):
            outputs = [inputs[0] and inputs[0]._replace(looked_up=True)]
        elif all(inputs):  # a weight stays one in another dtype or layout, scaled or normalised
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
            return []  # it sums over nothing, and so is no product of matrices
    else:  # rows times the matrix of their group cost as much as all rows times one matrix
        right, dimensions = right.update(shape=right.shape[1:]), (((1,), (0,)), ((), ()))
    weight = min((source for source in inputs[:2] if source and source.weight >= 0), default=_CONSTANT).weight
    result = equation.params["preferred_element_type"]
    return [Matmul(left, right, dimensions, result, times, weight if weight >= 0 else None)]


def _bodies(equation: jex.core.JaxprEqn) -> list[jex.core.Jaxpr]:
    closed, opened = jex.core.ClosedJaxpr, jex.core.Jaxpr
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, closed | opened))
    return [leaf.jaxpr if isinstance(leaf, closed) else leaf for leaf in leaves if isinstance(leaf, closed | opened)]


def _enter(equation: jex.core.JaxprEqn, body: jex.core.Jaxpr, inputs: list[_Source | None]) -> list[_Source | None]:
    """The sources of a body's inputs, which are the last ones of its equation; what a loop carries changes."""
    if equation.primitive.name == "scan":
        first, carried = equation.params["num_consts"], equation.params["num_carry"]
        inputs = [*inputs[:first], *[None] * carried, *inputs[first + carried :]]
    elif equation.primitive.name == "while":
        inputs = [None] * len(inputs)
    return inputs[len(inputs) - len(body.invars) :]
