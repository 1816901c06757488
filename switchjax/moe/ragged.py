"""Dropless experts as grouped matrix products: rows sorted by expert, every expert's matrices on its run of rows.

No slot is empty and no buffer has a limit (MegaBlocks, Gale et al. 2022). It is fast on TPUs, which have a kernel for
it; elsewhere XLA computes every expert on every row.
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
    """The result of dispatch, experts and combine for a capacity of a whole group.

    Args:
        experts: stacked on their first axis, called as `experts(rows, None, matmul)`.
        x: tokens.
        routing: with `token_slot`, of a router in which tokens choose.
    """
    assert routing.token_slot is not None, "rows are sorted by the experts that tokens choose"
    groups, num_experts, capacity = routing.slot_token.shape
    selected = routing.token_slot.shape[-1]
    expert = (routing.token_slot // capacity).reshape(-1)  # E: padding, or a choice given up
    rows = expert.shape[0]
    # Rows sorted by expert; `place` is the inverse, so that both moves are gathers in both directions.
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
    """Each expert's run of `rows`, as long as its size says, times its matrix; zeros after the last run.

    On TPUs by JAX's own kernels after MegaBlocks: `jax.lax.ragged_dot` has one there forwards, but computes the
    weights' gradient for every expert and row, with 64 experts 22 times the FLOPs in both directions (jax 0.10).
    """
    return jax.lax.platform_dependent(rows, weights, sizes, tpu=megablox_product, default=jax.lax.ragged_dot)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox_product(
    rows: Float[Array, "N D"], weights: Float[Array, "E D M"], sizes: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "N M"]:
    """`grouped_product` on TPUs; `interpret` does the same step by step on any device, for tests."""
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
"""Rows that the kernels take at a time, at least."""


def _run(kernel: Any, left: Array, right: Array, sizes: Array, dtype: Any, interpret: bool, **options: bool) -> Array:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which the kernels rely on
        return kernel(left, right, sizes, dtype, _tiles, interpret=interpret, **options)


def _tiles(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Tile sizes of a product's three dimensions: large tiles reuse what they have read, within a chip's 16 MiB."""
    return math.gcd(rows, 4 * _TILE), min(inputs, 4 * _TILE), min(outputs, 8 * _TILE)


def _padded(rows: Float[Array, "N D"]) -> Float[Array, "P D"]:
    return jnp.pad(rows, ((0, -rows.shape[0] % _TILE), (0, 0)))


def _routed(y: Float[Array, "P M"], rows: Float[Array, "N D"], sizes: Int[Array, "E"]) -> Float[Array, "N M"]:
    """`y` without padding, and with zeros in rows of no expert, which the kernels leave uninitialised."""
    routed = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    return jnp.where(routed, y[: rows.shape[0]], jnp.zeros((), y.dtype))
