"""`gather_sum` is a product with a 0-1 matrix, in the forward and the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from switchjax.moe.gather_sum import gather_sum


def random_relation(rng: np.random.Generator, rows: int, outputs: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that each output sums [M, K] and the outputs that each row is part of [N, J], at most `most` each."""
    index = np.full((outputs, most), rows, np.int32)
    inverse = np.full((rows, most), outputs, np.int32)
    for output in range(outputs):
        for k, row in enumerate(rng.choice(rows, size=rng.integers(0, most + 1), replace=False)):
            free = np.flatnonzero(inverse[row] == outputs)
            if len(free):
                index[output, k] = row
                inverse[row, free[0]] = output
    return index, inverse


def dense_matrix(index: np.ndarray, rows: int) -> np.ndarray:
    matrix = np.zeros((len(index), rows + 1))
    for output, parts in enumerate(index):
        for row in parts:
            matrix[output, row] += 1
    return matrix[:, :rows]


@pytest.mark.parametrize(("rows", "outputs", "most"), [(7, 5, 1), (5, 7, 1), (6, 9, 2), (9, 6, 4), (1, 1, 1)])
def test_values_and_gradients_are_those_of_the_dense_matrix(rows: int, outputs: int, most: int) -> None:
    rng = np.random.default_rng(rows)
    index, inverse = random_relation(rng, rows, outputs, most)
    matrix = dense_matrix(index, rows)
    values, cotangent = rng.normal(size=(rows, 3)).astype(np.float32), rng.normal(size=(outputs, 3)).astype(np.float32)

    out, pull = jax.vjp(lambda v: gather_sum(v, jnp.asarray(index), jnp.asarray(inverse)), jnp.asarray(values))
    # Sums of at most 4 float32 numbers of about 1: a few units in the last place.
    np.testing.assert_allclose(out, matrix @ values, rtol=0, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], matrix.T @ cotangent, rtol=0, atol=1e-6)


def test_gradients_are_those_of_finite_differences_twice_over() -> None:
    index, inverse = random_relation(np.random.default_rng(0), 6, 4, 2)
    rows = jax.random.normal(jax.random.key(0), (6, 3))

    @jax.jit
    def smooth(rows: jax.Array) -> jax.Array:
        return jnp.tanh(gather_sum(rows, jnp.asarray(index), jnp.asarray(inverse)))

    check_grads(smooth, (rows,), order=2, modes=["rev"], rtol=1e-2)  # float32 finite differences give 2-3 digits


def test_an_index_past_the_end_is_a_row_of_zeros_even_beside_infinities() -> None:
    rows = jnp.array([[jnp.inf], [jnp.nan], [2.0]])
    out = gather_sum(rows, jnp.array([[3], [2]]), jnp.array([[2], [2], [1]]))
    np.testing.assert_array_equal(out, [[0.0], [2.0]])


def test_bfloat16_rows_stay_bfloat16() -> None:
    rows = jnp.ones((2, 3), jnp.bfloat16)
    index = jnp.array([[1], [0]])
    out, pull = jax.vjp(lambda rows: gather_sum(rows, index, index), rows)
    assert out.dtype == jnp.bfloat16
    assert pull(out)[0].dtype == jnp.bfloat16
