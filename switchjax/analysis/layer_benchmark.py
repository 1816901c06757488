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
from switchjax.moe.slots import capacity_of


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
CAPACITY_FACTOR = 1.25


@dataclass(frozen=True)
class LayerTimes:
    """Median milliseconds, forwards and forwards + backwards, of each program.

    Attributes:
        temporaries: bytes that each program holds at most beside its arguments and results, forwards + backwards.
        dispatched: bytes of the tokens in all slots.
    """

    case: LayerCase
    capacity_factor: float
    forward: dict[str, float]
    both: dict[str, float]
    temporaries: dict[str, int]
    dispatched: int

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
    case: LayerCase, num_tokens: int, model: ModelConfig, capacity_factor: float, repeats: int
) -> LayerTimes:
    """Times groups of tokens through the layer with gathers and einsums, through its routing alone, and through the
    dense network, all in turn, with weights and tokens in `model.dtype`."""
    model = replace(model, param_dtype=model.dtype)
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
        layers[form] = MoELayer(make_expert, model.d_model, moe, key)
        layers[f"{form} routing"] = MoELayer(_Identity, model.d_model, moe, key)
    groups = max(1, num_tokens // case.num_tokens)
    x = jax.random.normal(key, (groups, case.num_tokens, model.d_model), model.dtype)
    forward = {name: partial(jax.jit(_apply), layer, x) for name, layer in layers.items()}
    gradient = jax.jit(jax.grad(_loss, argnums=(0, 1), has_aux=True))
    compiled = {name: gradient.lower(layer, x).compile() for name, layer in layers.items()}
    both = {name: partial(program, layers[name], x) for name, program in compiled.items()}
    slots = groups * case.num_experts * capacity_of(config, case.num_experts, case.num_tokens, training=False)
    return LayerTimes(
        case,
        capacity_factor,
        median_times(forward, repeats),
        median_times(both, repeats),
        {name: _temporaries(program) for name, program in compiled.items()},
        slots * model.d_model * x.dtype.itemsize,
    )


def _temporaries(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def _apply(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], RoutingSums]:
    """The output and, of an MoE layer, all its losses and metrics."""
    if isinstance(layer, MoELayer):
        return layer(x, jnp.ones(x.shape[:2], bool), None)
    return layer(x, None), {"load_balance_loss": jnp.zeros(())}


def _loss(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, ""], RoutingSums]:
    y, sums = _apply(layer, x)
    return jnp.sum(jnp.square(y.astype(jnp.float32))) + sums["load_balance_loss"], sums


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


def benchmark_layer(model: ModelConfig, repeats: int, report: Callable[[str], None]) -> str:
    """Times all cases and balanced assignment, and returns the table and what was found beside it.

    Args:
        model: d_model, d_ff and dtype.
        repeats: runs of each program, whose median counts.
        report: is told of each case that is finished, by its row of the table.
    """
    lines = [
        "| E, S, K | forward: dense, ms | gather | einsum | forward + backward: dense, ms | gather | einsum "
        "| routing and moves: gather, ms | einsum, ms | their temporaries over the tokens in slots: gather | einsum |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    times = {}
    for case in CASES:
        times[case] = time_layer(case, TOKENS, model, CAPACITY_FACTOR, repeats)
        lines.append(_row(times[case]))
        report(lines[-1])
    layer = times[ASSIGNED].both["gather"]
    assignment = time_assignment(ASSIGNED, TOKENS, repeats)
    shares = (f"{name} {ms:.1f} ms, {ms / layer:.3f} of the layer's time" for name, ms in assignment.items())
    beside = f"d_model {model.d_model}, d_ff {model.d_ff}, {model.dtype}, {TOKENS:,} tokens."
    return "\n".join([*lines, "", beside, f"Balanced assignment of {ASSIGNED}: {'; '.join(shares)}."])


def _row(times: LayerTimes) -> str:
    case = times.case
    cells = [f"{case.num_experts}, {case.num_tokens}, {case.num_selected}"]
    for both, by_name in ((False, times.forward), (True, times.both)):
        cells.append(f"{by_name['dense']:.1f}")
        cells += [f"{times.to_dense(form, both):.2f}" for form in ("gather", "einsum")]
    cells += [f"{times.both[f'{form} routing']:.1f}" for form in ("gather", "einsum")]
    cells += [f"{times.temporaries[f'{form} routing'] / times.dispatched:.1f}" for form in ("gather", "einsum")]
    return "| " + " | ".join(cells) + " |"
