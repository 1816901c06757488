"""A small MoE layer and its results."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.models.layers import dropout
from switchjax.moe.layer import MoELayer
from switchjax.parallel.sharding import is_variable
from tests.moe.reports import contents_of
from tests.parameters import random_parameters

D, F = 8, 16
ROWS, LENGTH = 16, 8


class TinyExpert(nnx.Module):
    """`tanh(x W_in) W_out`, with dropout between."""

    def __init__(self, rate: float, key: PRNGKeyArray):
        self.rate = rate
        in_key, out_key = jax.random.split(key)
        self.w_in = nnx.Param(jax.random.normal(in_key, (D, F)), axes=("embed", "mlp"))
        self.w_out = nnx.Param(jax.random.normal(out_key, (F, D)), axes=("mlp", "embed"))

    def __call__(
        self, x: jax.Array, key: PRNGKeyArray | None, matmul: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul
    ) -> jax.Array:
        return matmul(dropout(jnp.tanh(matmul(x, self.w_in[...])), self.rate, key), self.w_out[...])


def make_layer(seed: int = 0, **changes: Any) -> MoELayer:
    """A layer of tiny experts, by default 4; groups of 2 rows."""
    config = MoEConfig(**({"num_experts": 4, "group_size": 2 * LENGTH, "min_expert_capacity": 2} | changes))
    make_expert = partial(TinyExpert, config.expert_dropout)
    return random_parameters(lambda: MoELayer(make_expert, D, config, jax.random.key(0)), seed)


def make_inputs(seed: int = 0, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, L, D] and their mask, with padding at the ends of rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, LENGTH, D)).astype(np.float32)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, size=rows)
    return x, np.arange(LENGTH) < lengths[:, None]


def output_and_sums(
    layer: Any, x: jax.Array, mask: jax.Array, key: PRNGKeyArray | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The layer's outputs, and its whole report as one dictionary."""
    y, report = layer(x, mask, key)
    return y, contents_of(report)


def loss_and_everything(
    layer: MoELayer, x: jax.Array, mask: jax.Array, key: PRNGKeyArray | None
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """A loss with a different gradient for every output, with the outputs and the routing sums."""
    y, sums = output_and_sums(layer, x, mask, key)
    loss = jnp.sum(jnp.sin(y)) + sums["load_balance_loss"] + 0.1 * sums["router_z_loss"]
    return loss, (y, sums)


run = jax.jit(output_and_sums)
report_of = jax.jit(lambda layer, x, mask, key: layer(x, mask, key)[1])
run_with_gradients = jax.jit(jax.value_and_grad(loss_and_everything, argnums=(0, 1), has_aux=True))


def expert_slice(layer: MoELayer, expert: int) -> TinyExpert:
    """One of the layer's experts."""
    return jax.tree.map(lambda variable: variable[expert], layer.experts)


def set_experts(layer: MoELayer, source: TinyExpert) -> None:
    """Makes every expert of the layer a copy of `source`."""
    copies, originals = (jax.tree.leaves(tree, is_leaf=is_variable) for tree in (layer.experts, source))
    for copy, original in zip(copies, originals, strict=True):
        copy[...] = jnp.broadcast_to(original[...][None], copy.shape)
