"""A long short-term memory layer (Hochreiter and Schmidhuber 1997; with a projection, Sak et al. 2014)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from switchjax.config import ModelConfig
from switchjax.models.cache import LSTMState
from switchjax.models.layers import kernel


class LSTM(nnx.Module):
    """`c_t = f c_{t-1} + i tanh(g)`, `h_t = (o tanh(c_t)) W_p`, with i, f, g, o from `x_t W_x + h_{t-1} W_h + b`.

    W_p exists only if the number of cells is not D. The state starts again at each packed sequence, so none sees
    another.
    """

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        input_key, hidden_key, project_key = jax.random.split(key, 3)
        cells, dtype = config.lstm_cells, config.param_dtype
        gates, axes = (config.d_model, 4, cells), ("embed", None, None)
        # Variance 1 / fan_in: with the 0.1 / fan_in of residual layers, the state fades.
        self.w_x = kernel(input_key, gates, axes, dtype, scale=1.0)
        self.w_h = kernel(hidden_key, gates, axes, dtype, scale=1.0)
        bias = jnp.zeros((4, cells), dtype).at[1].set(1)  # a forget gate that starts open (Jozefowicz et al. 2015)
        self.bias = nnx.Param(bias, axes=(None, None))
        projected = cells != config.d_model
        self.project = kernel(project_key, (cells, config.d_model), (None, "embed"), dtype) if projected else None

    def empty(self, rows: int, dtype: DTypeLike) -> LSTMState:
        """The state before the first token."""
        cells, d_model = self.w_h.shape[-1], self.w_h.shape[0]
        return LSTMState(jnp.zeros((rows, d_model), dtype), jnp.zeros((rows, cells), dtype))

    def __call__(self, x: Float[Array, "B L D"], segments: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The hidden state after each token; `segments` numbers the packed sequences."""
        same = segments[:, 1:] == segments[:, :-1]
        continues = jnp.concatenate([jnp.zeros_like(segments[:, :1], bool), same], axis=1)
        step = self._step(x.dtype)

        def advance(state: LSTMState, at: tuple[Array, Array]) -> tuple[LSTMState, Array]:
            gates, kept = at  # kept: False at the start of a sequence
            old = jax.tree.map(lambda part: jnp.where(kept[:, None], part, jnp.zeros((), part.dtype)), state)
            state = step(old, gates)
            return state, state.hidden

        _, hidden = jax.lax.scan(advance, self.empty(x.shape[0], x.dtype), (self._gates(x), continues.T))
        return hidden.swapaxes(0, 1)

    def extend(
        self, x: Float[Array, "B L D"], token_mask: Bool[Array, "B L"], state: LSTMState
    ) -> tuple[Float[Array, "B L D"], LSTMState]:
        """The hidden state after each further token, and the state after the last one; padding does not change it."""
        step = self._step(x.dtype)

        def advance(state: LSTMState, at: tuple[Array, Array]) -> tuple[LSTMState, Array]:
            gates, real = at
            after = jax.tree.map(lambda new, old: jnp.where(real[:, None], new, old), step(state, gates), state)
            return after, after.hidden

        state, hidden = jax.lax.scan(advance, state, (self._gates(x), token_mask.T))
        return hidden.swapaxes(0, 1), state

    def _gates(self, x: Float[Array, "B L D"]) -> Float[Array, "L B 4 cells"]:
        """The inputs' share of the gates."""
        inputs = jnp.einsum("bld,dgc->lbgc", x, self.w_x[...].astype(x.dtype))
        return inputs + self.bias[...].astype(x.dtype)[None, None]

    def _step(self, dtype: DTypeLike) -> Callable[[LSTMState, Float[Array, "B 4 cells"]], LSTMState]:
        w_h = self.w_h[...].astype(dtype)
        project = None if self.project is None else self.project[...].astype(dtype)

        def step(state: LSTMState, gates: Float[Array, "B 4 cells"]) -> LSTMState:
            gates = gates + jnp.einsum("bd,dgc->bgc", state.hidden, w_h)
            enter, forget, candidate, leave = (gates[:, gate] for gate in range(4))
            cell = jax.nn.sigmoid(forget) * state.cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
            hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return LSTMState(hidden if project is None else hidden @ project, cell)

        return step
