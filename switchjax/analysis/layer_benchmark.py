"""How long an MoE layer takes beside the dense feed-forward network of the same FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.analysis.timing import median_times
from switchjax.config import ModelConfig, MoEConfig
from switchjax.models.layers import FeedForward
from switchjax.moe.assignment import balanced_assignment, sinkhorn
from switchjax.moe.layer import MoELayer, RoutingSums


@dataclass(frozen=True)
class LayerCase:
    """One row of the table: experts, tokens of a group, selected experts."""

    num_experts: int
    num_tokens: int
    num_selected: int

    def __str__(self) -> str:
        return f"E={self.num_experts} S={self.num_tokens} K={self.num_selected}"


CASES = (
    LayerCase(8, 512, 2),
    LayerCase(8, 2048, 1),
    LayerCase(16, 2048, 2),
    LayerCase(64, 4096, 1),
    LayerCase(64, 4096, 2),
    LayerCase(128, 4096, 1),
    LayerCase(512, 4096, 1),
)
"""From small groups to many experts."""
ASSIGNED = LayerCase(64, 4096, 1)
"""The case whose tokens are also assigned in balance."""
TOKENS = 16384
"""Of all groups together, as a device has them in a train step."""
D_MODEL, D_FF, CAPACITY_FACTOR = 512, 2048, 1.25


@dataclass(frozen=True)
class LayerTimes:
    """Median milliseconds, forwards and forwards + backwards, of each program."""

    case: LayerCase
    capacity_factor: float
    forward: dict[str, float]
    both: dict[str, float]

    def to_dense(self, name: str, both: bool) -> float:
        """The layer's time over `capacity_factor * K` times the dense network's: 1 is what its products alone cost."""
        times = self.both if both else self.forward
        return times[name] / (self.capacity_factor * self.case.num_selected * times["dense"])


class _Identity(nnx.Module):
    """An expert that does nothing: what is left of the layer is routing, dispatch and combine."""

    def __init__(self, key: PRNGKeyArray):
        del key

    def __call__(self, x: Float[Array, "N D"], key: PRNGKeyArray | None) -> Float[Array, "N D"]:
        return x


def time_layer(
    case: LayerCase, num_tokens: int, d_model: int, d_ff: int, capacity_factor: float, repeats: int
) -> LayerTimes:
    """Times groups of tokens through the layer with gathers and einsums, through its routing alone, and through the
    dense network, all in turn."""
    model = ModelConfig(d_model=d_model, d_ff=d_ff)
    config = MoEConfig(
        router="top_k",
        num_experts=case.num_experts,
        num_selected_experts=case.num_selected,
        group_size=case.num_tokens,
        train_capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        min_expert_capacity=1,
    )
    key = jax.random.key(0)
    make_expert = partial(FeedForward, model, 0.0)
    layers: dict[str, nnx.Module] = {"dense": make_expert(key)}
    for form in ("gather", "einsum"):
        moe = replace(config, dispatch=form)
        layers[form] = MoELayer(make_expert, d_model, moe, key)
        layers[f"{form} routing"] = MoELayer(_Identity, d_model, moe, key)
    x = jax.random.normal(key, (max(1, num_tokens // case.num_tokens), case.num_tokens, d_model))
    forward = {name: partial(jax.jit(_apply), layer, x) for name, layer in layers.items()}
    both = {
        name: partial(jax.jit(jax.grad(_loss, argnums=(0, 1), has_aux=True)), layer, x)
        for name, layer in layers.items()
    }
    return LayerTimes(case, capacity_factor, median_times(forward, repeats), median_times(both, repeats))


def _apply(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], RoutingSums]:
    """The output and, of an MoE layer, all its losses and metrics."""
    if isinstance(layer, MoELayer):
        return layer(x, jnp.ones(x.shape[:2], bool), None)
    return layer(x, None), {"load_balance_loss": jnp.zeros(())}


def _loss(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, ""], RoutingSums]:
    y, sums = _apply(layer, x)
    return jnp.sum(jnp.square(y)) + sums["load_balance_loss"], sums


def time_assignment(case: LayerCase, num_tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the balanced assignments of as many tokens, with normal scores."""
    scores = jax.random.normal(jax.random.key(0), (num_tokens // case.num_tokens, case.num_tokens, case.num_experts))
    mask = jnp.ones(scores.shape[:2], bool)
    config = MoEConfig()
    auction = jax.jit(
        partial(balanced_assignment, capacity=-(-case.num_tokens // case.num_experts), max_rounds=config.auction_rounds)
    )
    plan = jax.jit(partial(sinkhorn, iterations=config.sinkhorn_iterations))
    return median_times({"auction": partial(auction, scores, mask), "sinkhorn": partial(plan, scores, mask)}, repeats)


def benchmark_layer(repeats: int, report: Callable[[str], None]) -> str:
    """Times all cases and balanced assignment, and returns the table and what was found beside it.

    Args:
        repeats: runs of each program, whose median counts.
        report: is told of each case that is finished, by its row of the table.
    """
    lines = [
        "| E, S, K | forward: dense, ms | gather | einsum | forward + backward: dense, ms | gather | einsum "
        "| routing and moves: gather, ms | einsum, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    times = {}
    for case in CASES:
        times[case] = time_layer(case, TOKENS, D_MODEL, D_FF, CAPACITY_FACTOR, repeats)
        lines.append(_row(times[case]))
        report(lines[-1])
    layer = times[ASSIGNED].both["gather"]
    assignment = time_assignment(ASSIGNED, TOKENS, repeats)
    shares = (f"{name} {ms:.1f} ms, {ms / layer:.3f} of the layer's time" for name, ms in assignment.items())
    return "\n".join([*lines, "", f"Balanced assignment of {ASSIGNED}: {'; '.join(shares)}."])


def _row(times: LayerTimes) -> str:
    case = times.case
    cells = [f"{case.num_experts}, {case.num_tokens}, {case.num_selected}"]
    for both, by_name in ((False, times.forward), (True, times.both)):
        cells.append(f"{by_name['dense']:.1f}")
        cells += [f"{times.to_dense(form, both):.2f}" for form in ("gather", "einsum")]
    cells += [f"{times.both[f'{form} routing']:.1f}" for form in ("gather", "einsum")]
    return "| " + " | ".join(cells) + " |"
