"""How long an MoE layer takes beside the dense feed-forward network of the same FLOPs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.config import ModelConfig, MoEConfig
from switchjax.config.checks import require
from switchjax.models.layers import FeedForward
from switchjax.moe.assignment import balanced_assignment, sinkhorn
from switchjax.moe.capacity import capacity_of
from switchjax.moe.layer import MoELayer
from switchjax.moe.routers.base import BaseOptions
from switchjax.moe.routers.sinkhorn import SinkhornOptions
from switchjax.moe.routing import RoutingReport
from switchjax.studies.markdown import show_row
from switchjax.studies.timing import Ratio, interleaved_seconds, median_times


@dataclass(frozen=True)
class LayerCase:
    """Experts, tokens of a group, selected experts."""

    num_experts: int
    num_tokens: int
    num_selected: int

    def __str__(self) -> str:
        return f"{self.num_experts}, {self.num_tokens}, {self.num_selected}"


CASES = (
    LayerCase(8, 2048, 1),
    LayerCase(8, 2048, 2),
    LayerCase(16, 2048, 2),
    LayerCase(64, 4096, 1),
    LayerCase(64, 4096, 2),
    LayerCase(128, 4096, 1),
    LayerCase(512, 4096, 1),
)
"""From few to many experts."""
ASSIGNED = LayerCase(64, 4096, 1)
"""The tokens that are assigned in balance."""
CAPACITY_FACTOR = 1.25


def cases_of(experts: Sequence[int]) -> list[LayerCase]:
    """The cases of so many experts.

    Raises:
        UserError: for a number that no case has.
    """
    known = sorted({case.num_experts for case in CASES})
    for count in experts:
        require(count in known, f"no case has {count} experts (known: {', '.join(map(str, known))})")
    return [case for case in CASES if case.num_experts in experts]


@dataclass(frozen=True)
class BesideDense:
    """Times of the layer and the dense network.

    Attributes:
        dense: median milliseconds of the dense network.
        ratio: the layer's time over that for as many rows as the experts compute: `capacity_factor * K` times the
            dense network's, without slots K times; 1 is what the products of these rows alone cost.
    """

    dense: float
    ratio: Ratio


@dataclass(frozen=True)
class LayerTimes:
    """What one layer costs.

    Attributes:
        forward: forwards.
        both: in both directions.
        routing: median milliseconds of the layer whose experts do nothing, in both directions.
        temporaries: bytes which that holds at most beside its arguments and results.
        dispatched: bytes of the tokens in all slots.
    """

    forward: BesideDense
    both: BesideDense
    routing: float
    temporaries: int
    dispatched: int


class _Identity(nnx.Module):
    """An expert that does nothing: what is left of the layer is routing, dispatch and combine."""

    def __init__(self, key: PRNGKeyArray):
        del key

    def __call__(
        self, x: Float[Array, "N D"], key: PRNGKeyArray | None, matmul: Callable[..., Array] | None = None
    ) -> Float[Array, "N D"]:
        return x


def time_layer(
    case: LayerCase, num_tokens: int, model: ModelConfig, dispatches: Sequence[str], repeats: int
) -> dict[str, LayerTimes]:
    """Times groups of tokens through the layer in each form of dispatch, through its routing alone, and through the
    dense network, all in turn.

    Args:
        case: of the layers.
        num_tokens: of all groups together, a multiple of a group's.
        model: d_model, d_ff, and the dtype of weights and tokens.
        dispatches: values of `moe.dispatch`.
        repeats: rounds.
    """
    model = replace(model, param_dtype=model.dtype)
    key = jax.random.key(0)
    make_expert = partial(FeedForward, model, 0.0)
    layers: dict[str, nnx.Module] = {"dense": make_expert(key)}
    for dispatch in dispatches:
        config = _moe_config(case, dispatch)
        layers[dispatch] = MoELayer(make_expert, model.d_model, config, key)
        layers[f"{dispatch} routing"] = MoELayer(_Identity, model.d_model, config, key)
    groups = num_tokens // case.num_tokens
    x = jax.random.normal(key, (groups, case.num_tokens, model.d_model), model.dtype)
    one_way = _compile(jax.jit(_apply), {name: layers[name] for name in ("dense", *dispatches)}, x)
    two_ways = _compile(jax.jit(jax.grad(_loss, argnums=(0, 1), has_aux=True)), layers, x)
    forward, both = (
        interleaved_seconds({name: partial(program, layers[name], x) for name, program in compiled.items()}, repeats)
        for compiled in (one_way, two_ways)
    )

    def beside_dense(dispatch: str, times: dict[str, list[float]]) -> BesideDense:
        dense, rows_a_token = times["dense"], _count_rows(case, groups, dispatch) / num_tokens
        return BesideDense(
            1000 * statistics.median(dense), Ratio.of(times[dispatch], [rows_a_token * s for s in dense])
        )

    return {
        dispatch: LayerTimes(
            forward=beside_dense(dispatch, forward),
            both=beside_dense(dispatch, both),
            routing=1000 * statistics.median(both[f"{dispatch} routing"]),
            temporaries=_temporaries(two_ways[f"{dispatch} routing"]),
            dispatched=_count_rows(case, groups, dispatch) * model.d_model * x.dtype.itemsize,
        )
        for dispatch in dispatches
    }


def plan_layer(
    case: LayerCase, num_tokens: int, model: ModelConfig, dispatch: str, device: jax.Device
) -> tuple[float, float]:
    """The layer in both directions, compiled for a device that may be described only.

    Returns:
        Its FLOPs over those of the products of the experts' rows, and its temporaries, with experts that do nothing,
        over the bytes of those rows.
    """
    model = replace(model, param_dtype=model.dtype)
    groups, key = num_tokens // case.num_tokens, jax.random.key(0)
    place = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((groups, case.num_tokens, model.d_model), model.dtype, sharding=place)
    compiled = []
    for make_expert in (partial(FeedForward, model, 0.0), _Identity):
        layer = MoELayer(make_expert, model.d_model, _moe_config(case, dispatch), key)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), layer)
        gradient = jax.jit(jax.grad(_loss, argnums=(0, 1), has_aux=True), out_shardings=place)
        compiled.append(gradient.lower(shapes, x).compile())
    whole, routing = compiled
    rows = _count_rows(case, groups, dispatch)
    products = 3 * 2 * 2 * rows * model.d_model * model.d_ff
    cost = whole.cost_analysis() or {}
    return cost["flops"] / products, _temporaries(routing) / (rows * model.d_model * x.dtype.itemsize)


def _moe_config(case: LayerCase, dispatch: str) -> MoEConfig:
    return MoEConfig(
        router="top_k",
        num_experts=case.num_experts,
        num_selected_experts=case.num_selected,
        group_size=case.num_tokens,
        train_capacity_factor=CAPACITY_FACTOR,
        eval_capacity_factor=CAPACITY_FACTOR,
        min_expert_capacity=1,
        dispatch=dispatch,
        dropless=dispatch == "ragged",
    )


def _compile(function: Any, layers: Mapping[str, nnx.Module], x: Array) -> dict[str, jax.stages.Compiled]:
    """`function(layer, x)` of each layer, compiled side by side."""
    lowered = [function.lower(layer, x) for layer in layers.values()]
    with ThreadPoolExecutor() as pool:
        return dict(zip(layers, pool.map(jax.stages.Lowered.compile, lowered), strict=True))


def _count_rows(case: LayerCase, groups: int, dispatch: str) -> int:
    """Rows that the experts compute: all slots, or without slots each token's choices."""
    config = _moe_config(case, dispatch)
    if config.dropless:
        return groups * case.num_tokens * case.num_selected
    return groups * case.num_experts * capacity_of(config, case.num_experts, case.num_tokens, training=False)


def _temporaries(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def _apply(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], RoutingReport]:
    """The output and, of an MoE layer, its report."""
    if isinstance(layer, MoELayer):
        return layer(x, jnp.ones(x.shape[:2], bool), None)
    return layer(x, None), RoutingReport({"load_balance_loss": jnp.zeros(())})


def _loss(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, ""], RoutingReport]:
    y, report = _apply(layer, x)
    return jnp.sum(jnp.square(y.astype(jnp.float32))) + report.losses["load_balance_loss"], report


def time_assignment(case: LayerCase, groups: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the balanced assignments of as many groups of tokens, with normal scores."""
    scores = jax.random.normal(jax.random.key(0), (groups, case.num_tokens, case.num_experts))
    mask = jnp.ones(scores.shape[:2], bool)
    auction = jax.jit(
        partial(
            balanced_assignment,
            capacity=-(-case.num_tokens // case.num_experts),
            max_rounds=BaseOptions().auction_rounds,
        )
    )
    plan = jax.jit(partial(sinkhorn, iterations=SinkhornOptions().sinkhorn_iterations))
    return median_times({"auction": partial(auction, scores, mask), "sinkhorn": partial(plan, scores, mask)}, repeats)


def benchmark_layer(
    models: Sequence[ModelConfig],
    cases: Sequence[LayerCase],
    num_tokens: int,
    dispatches: Sequence[str],
    repeats: int,
    report: Callable[[str], None],
) -> str:
    """Times each case in each model and form of dispatch, then balanced assignment, and returns the table.

    Args:
        models: d_model, d_ff and dtype of each.
        cases: as `CASES`.
        num_tokens: of all groups together.
        dispatches: values of `moe.dispatch`.
        repeats: rounds, whose medians count.
        report: is told of each row that is finished.
    """
    lines = [
        "| d_model, dtype | E, S, K | dispatch | forward: dense, ms | the layer over that for its experts' rows "
        "| forward + backward: dense, ms | the layer over that for its experts' rows | routing and moves, ms "
        "| their temporaries over the experts' rows |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in models:
        for case in cases:
            for dispatch, times in time_layer(case, num_tokens, model, dispatches, repeats).items():
                cells = [f"{model.d_model}, {model.dtype}", str(case), dispatch]
                for beside_dense in (times.forward, times.both):
                    cells += [f"{beside_dense.dense:.1f}", str(beside_dense.ratio)]
                cells += [f"{times.routing:.1f}", f"{times.temporaries / times.dispatched:.1f}"]
                lines.append(show_row(cells))
                report(lines[-1])
    groups = -(-num_tokens // ASSIGNED.num_tokens)
    assignment = time_assignment(ASSIGNED, groups, repeats)
    shown = "; ".join(f"{name} {ms:.1f} ms" for name, ms in assignment.items())
    beside = f"d_ff is 4 d_model, the capacity factor {CAPACITY_FACTOR}, {num_tokens:,} tokens in groups of S."
    assigned = f"Balanced assignment of {groups * ASSIGNED.num_tokens:,} tokens to {ASSIGNED.num_experts} experts"
    return "\n".join([*lines, "", f"{beside} {assigned}: {shown}."])
