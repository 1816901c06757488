"""A long short-term memory layer (Hochreiter and Schmidhuber 1997; with a projection, Sak et al. 2014)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import ModelConfig
from switchjax.models.layers import kernel


class LSTM(nnx.Module):
    """`c_t = f c_{t-1} + i tanh(g)`, `h_t = (o tanh(c_t)) W_p`, with i, f, g, o from `x_t W_x + h_{t-1} W_h + b`.

    W_p only where the number of cells is not D. The state begins anew with each packed sequence, so that none sees
    another.
    """

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        input_key, hidden_key, project_key = jax.random.split(key, 3)
        cells, dtype = config.lstm_cells, config.param_dtype
        gates, axes = (config.d_model, 4, cells), ("embed", None, None)
        # Of the usual variance 1 / fan_in: a tenth of it, as of residual layers, lets the state fade.
        self.w_x = kernel(input_key, gates, axes, dtype, scale=1.0)
        self.w_h = kernel(hidden_key, gates, axes, dtype, scale=1.0)
        bias = jnp.zeros((4, cells), dtype).at[1].set(1)  # a forget gate that starts open (Jozefowicz et al. 2015)
        self.bias = nnx.Param(bias, axes=(None, None))
        projected = cells != config.d_model
        self.project = kernel(project_key, (cells, config.d_model), (None, "embed"), dtype) if projected else None

    def __call__(self, x: Float[Array, "B L D"], segments: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The hidden state after each token.

        Args:
            x: inputs.
            segments: the packed sequence that each token belongs to.
        """
        continues = jnp.concatenate(
            [jnp.zeros_like(segments[:, :1], bool), segments[:, 1:] == segments[:, :-1]], axis=1
        )
        inputs = jnp.einsum("bld,dgc->lbgc", x, self.w_x[...].astype(x.dtype))
        inputs += self.bias[...].astype(x.dtype)[None, None]
        w_h = self.w_h[...].astype(x.dtype)
        project = None if self.project is None else self.project[...].astype(x.dtype)

        def step(state: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            gates, kept = at
            hidden, cell = (jnp.where(kept[:, None], part, jnp.zeros((), part.dtype)) for part in state)
            gates += jnp.einsum("bd,dgc->bgc", hidden, w_h)
            enter, forget, candidate, leave = (gates[:, gate] for gate in range(4))
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
            hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            hidden = hidden if project is None else hidden @ project
            return (hidden, cell), hidden

        start = jnp.zeros_like(x[:, 0]), jnp.zeros_like(inputs[0, :, 0])
        _, hidden = jax.lax.scan(step, start, (inputs, continues.T))
        return hidden.swapaxes(0, 1)
