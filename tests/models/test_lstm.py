"""The LSTM against its equations, one step at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.models.lstm import LSTM
from tests.models.families import FAMILIES
from tests.parameters import random_parameters


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("cells", [0, 20], ids=["as wide as the model", "projected"])
def test_each_step_follows_the_equations_and_packed_sequences_start_anew(cells: int) -> None:
    config = dataclasses.replace(FAMILIES["lstm"].model, d_lstm=cells)
    lstm = random_parameters(lambda: LSTM(config, jax.random.key(0)))
    assert (lstm.project is None) == (cells == 0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, config.d_model)).astype(np.float32)
    segments = np.array([[1] * 4 + [2] * 5, [1] * 9, [1] * 2 + [2] * 3 + [0] * 4], np.int32)
    actual = np.asarray(jax.jit(lambda lstm, x, s: lstm(x, s))(lstm, jnp.asarray(x), jnp.asarray(segments)))

    w_x, w_h, bias = (np.asarray(w[...], np.float64) for w in (lstm.w_x, lstm.w_h, lstm.bias))
    for row in range(3):
        hidden, cell = np.zeros(config.d_model), np.zeros(w_h.shape[-1])
        for t in range(9):
            if t and segments[row, t] != segments[row, t - 1]:
                hidden, cell = np.zeros_like(hidden), np.zeros_like(cell)
            i, f, g, o = np.einsum("d,dgc->gc", x[row, t], w_x) + np.einsum("d,dgc->gc", hidden, w_h) + bias
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            if lstm.project is not None:
                hidden = hidden @ np.asarray(lstm.project[...], np.float64)
            # float32 against float64 over nine steps.
            np.testing.assert_allclose(actual[row, t], hidden, rtol=1e-4, atol=1e-5)
