"""Dropless experts as grouped matrix products: rows are sorted by expert, and each expert multiplies its run of rows.

There are no slots, so none is empty and none is missing (MegaBlocks, Gale et al. 2022). This is fast on TPUs, which
have a kernel for it; elsewhere XLA computes every expert on every row.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from switchjax.moe.gather_sum import gather_sum
from switchjax.moe.routing import Routing


def apply_ragged(experts: Any, x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "G S M"]:
    """The experts' outputs for each token, weighted by their gates and summed, as if C were the whole group.

    `experts` are stacked on their first axis and called as `experts(rows, None, matmul)`.
    """
    assert routing.token_slot is not None, "rows are sorted by the experts that tokens choose"
    groups, num_experts, capacity = routing.slot_token.shape
    selected = routing.token_slot.shape[-1]
    expert = (routing.token_slot // capacity).reshape(-1)  # E: padding, or a choice given up
    rows = expert.shape[0]
    # Row t * K + k is the k-th choice of token t. `order` sorts rows by expert, and `place` is its inverse. With both,
    # the way to the experts and the way back are gathers, in the forward and the backward pass.
    order = jnp.argsort(expert, stable=True)
    place = jnp.where(expert < num_experts, jnp.argsort(order), rows)
    token = jnp.where(expert[order] < num_experts, order // selected, rows // selected)
    sizes = jnp.sum(jax.nn.one_hot(expert, num_experts, dtype=jnp.int32), axis=0)

    lined_up = gather_sum(x.reshape(-1, x.shape[-1]), token[:, None], place.reshape(-1, selected))
    y = experts(lined_up, None, partial(grouped_product, sizes=sizes))
    offset = jnp.arange(groups)[:, None, None] * (num_experts * capacity)
    slot = jnp.where(routing.token_slot < num_experts * capacity, offset + routing.token_slot, routing.slot_gate.size)
    gate = jnp.take(routing.slot_gate.reshape(-1), slot.reshape(-1)[order], mode="fill", fill_value=0)
    weighted = y * gate[:, None].astype(y.dtype)
    out = gather_sum(weighted, place.reshape(-1, selected), token[:, None])
    return out.reshape(*x.shape[:2], -1)


def grouped_product(
    rows: Float[Array, "N D"], weights: Float[Array, "E D M"], sizes: Int[Array, "E"]
) -> Float[Array, "N M"]:
    """Each expert's run of `sizes[e]` rows times its matrix; zeros after the last run."""
    # On TPUs, `jax.lax.ragged_dot` has a kernel for the forward pass, but computes the weights' gradient for every
    # expert and row: with 64 experts, 22 times the FLOPs of both passes (jax 0.10). So JAX's MegaBlocks kernels serve
    # there.
    return jax.lax.platform_dependent(rows, weights, sizes, tpu=megablox_product, default=jax.lax.ragged_dot)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox_product(
    rows: Float[Array, "N D"], weights: Float[Array, "E D M"], sizes: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "N M"]:
    """`grouped_product` on TPUs; `interpret` runs the kernel step by step on any device, for tests."""
    return _routed(_run(gmm, _padded(rows), weights, sizes, rows.dtype, interpret), rows, sizes)


def _forward(rows: Array, weights: Array, sizes: Array, interpret: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    return megablox_product(rows, weights, sizes, interpret), (rows, weights, sizes)


def _backward(
    interpret: bool, saved: tuple[Array, Array, Array], gradient: Float[Array, "N M"]
) -> tuple[Array, Array, None]:
    rows, weights, sizes = saved
    padded = _padded(gradient)
    of_rows = _run(gmm, padded, weights, sizes, rows.dtype, interpret, transpose_rhs=True)
    of_weights = _run(tgmm, _padded(rows).T, padded, sizes, weights.dtype, interpret)
    return _routed(of_rows, rows, sizes), of_weights, None


megablox_product.defvjp(_forward, _backward)

_TILE = 128
"""The smallest number of rows that the kernels take at a time."""


def _run(kernel: Any, left: Array, right: Array, sizes: Array, dtype: Any, interpret: bool, **options: bool) -> Array:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the kernels rely on both
        return kernel(left, right, sizes, dtype, _tiles, interpret=interpret, **options)


def _tiles(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Tile sizes of a product's three dimensions: large to reread little, but within a chip's 16 MiB."""
    return math.gcd(rows, 4 * _TILE), min(inputs, 4 * _TILE), min(outputs, 8 * _TILE)


def _padded(rows: Float[Array, "N D"]) -> Float[Array, "P D"]:
    return jnp.pad(rows, ((0, -rows.shape[0] % _TILE), (0, 0)))


def _routed(y: Float[Array, "P M"], rows: Float[Array, "N D"], sizes: Int[Array, "E"]) -> Float[Array, "N M"]:
    """`y` without padding, with zeros in the rows of no expert, which the kernels leave uninitialised."""
    routed = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    return jnp.where(routed, y[: rows.shape[0]], jnp.zeros((), y.dtype))
