"""All matrix products of a program are found, also in loops and branches, with their weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from switchjax.accounting.matmuls import matmuls


def program(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.relu(x @ weight), None

    x, _ = jax.lax.scan(layer, x, weights["layers"])
    return jax.jit(lambda x: jnp.einsum("bd,dv->bv", x, weights["head"]))(x)


def test_matmuls_are_found_as_often_as_they_run() -> None:
    found = matmuls(program, {"layers": jnp.ones((5, 4, 4)), "head": jnp.ones((4, 7))}, jnp.ones((3, 4)))
    assert [(matmul.left.shape, matmul.right.shape, matmul.times) for matmul in found] == [
        ((3, 4), (4, 4), 5),
        ((3, 4), (4, 7), 1),
    ]
    assert [matmul.flops for matmul in found] == [5 * 2 * 3 * 4 * 4, 2 * 3 * 4 * 7]
    assert [matmul.weight for matmul in found] == [1, 0]  # the leaves' order is that of their names


def branches(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ weights, lambda: x @ weights @ weights)


def normalised(weights: jax.Array, x: jax.Array) -> jax.Array:
    return x @ (2.0 * weights.astype(jnp.float32) / jnp.linalg.norm(weights, axis=0, keepdims=True)).T


def recomputed(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda x: jax.nn.relu(x @ weights))(x)


def looked_up(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.take(weights, x[:, 0].astype(jnp.int32), axis=0) @ weights.T


def carried(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, y: y + x.T @ x, weights)


def elementwise(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bd,b->bd", x, weights[0])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (branches, [(128, 0), (128, 0)]),
        (normalised, [(128, 0)]),
        (recomputed, [(128, 0)]),
        (looked_up, [(128, 0)]),
        (carried, [(3 * 128, None)]),
        (lambda weights, x: x @ x, [(128, None)]),
        (elementwise, []),
    ],
)
def test_a_weight_is_known_in_every_form(
    function: Callable[[jax.Array, jax.Array], jax.Array], expected: list[tuple[int, int | None]]
) -> None:
    found = matmuls(function, jnp.ones((4, 4)), jnp.ones((4, 4)))
    assert [(matmul.flops, matmul.weight) for matmul in found] == expected


def test_rows_that_are_looked_up_are_the_vectors_of_another_weight() -> None:
    def model(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return jnp.take(weights["embedding"], tokens, axis=0) @ weights["head"]

    (found,) = matmuls(model, {"embedding": jnp.ones((9, 4)), "head": jnp.ones((4, 2))}, jnp.arange(3))
    assert found.weight == 1


def test_grouped_products_cost_as_much_as_their_rows() -> None:
    def grouped(weights: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, weights, jnp.array([2, 4], jnp.int32))

    (found,) = matmuls(grouped, jnp.ones((2, 4, 5)), jnp.ones((6, 4)))
    assert (found.flops, found.weight) == (2 * 6 * 4 * 5, 0)
