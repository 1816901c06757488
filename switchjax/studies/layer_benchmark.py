"""Times an MoE layer beside the dense feed-forward network of the same FLOPs."""

import itertools
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.config import ModelConfig, MoEConfig
from switchjax.config.checks import require
from switchjax.config.model import Dtype
from switchjax.models.layers import FeedForward
from switchjax.moe.assignment import balanced_assignment, sinkhorn
from switchjax.moe.capacity import capacity_of
from switchjax.moe.layer import MoELayer
from switchjax.moe.routers.base import BaseOptions
from switchjax.moe.routers.sinkhorn import SinkhornOptions
from switchjax.moe.routing import RoutingReport
from switchjax.studies.flags import LoadConfig, add_repeats
from switchjax.studies.report import Row, listed, number, text
from switchjax.studies.timing import Ratio, interleaved_seconds


@dataclass(frozen=True)
class LayerCase:
    """The sizes of routing in a layer."""

    num_experts: int
    num_tokens: int
    """Tokens of a group."""
    num_selected: int


_SIZES = ((8, 2048, 1), (8, 2048, 2), (16, 2048, 2), (64, 4096, 1), (64, 4096, 2), (128, 4096, 1), (512, 4096, 1))
CASES = tuple(LayerCase(*sizes) for sizes in _SIZES)
ASSIGNED = LayerCase(64, 4096, 1)
"""The case of the balanced assignment."""
CAPACITY_FACTOR = 1.25
FORMS = ("gather", "einsum", "ragged")
"""Values of `moe.dispatch`."""


@dataclass(frozen=True)
class LayerSizes:
    """Width and dtype of a layer; d_ff is 4 d_model."""

    d_model: int
    dtype: Dtype = "float32"

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(d_model=self.d_model, d_ff=4 * self.d_model, dtype=self.dtype, param_dtype=self.dtype)


def cases_of(experts: Sequence[int]) -> list[LayerCase]:
    """The cases with these numbers of experts; refuses a number that no case has."""
    known = sorted({case.num_experts for case in CASES})
    for count in experts:
        require(count in known, f"no case has {count} experts (known: {', '.join(map(str, known))})")
    return [case for case in CASES if case.num_experts in experts]


@dataclass(frozen=True)
class LayerRow:
    """Median times of a layer.

    A ratio of 1 means: the layer takes as long as the dense network takes for as many rows as the experts compute.
    """

    sizes: Annotated[LayerSizes, text("d_model, dtype", listed)]
    case: Annotated[LayerCase, text("E, S, K", listed)]
    dispatch: Annotated[str, text("dispatch")]
    dense_forward_ms: Annotated[float, number("forward: dense, ms", "{:.1f}".format)]
    forward_ratio: Annotated[Ratio, number("the layer over that for its experts' rows")]
    dense_both_ms: Annotated[float, number("forward + backward: dense, ms", "{:.1f}".format)]
    both_ratio: Annotated[Ratio, number("the layer over that for its experts' rows")]
    routing_ms: Annotated[float, number("routing and moves, ms", "{:.1f}".format)]
    """Forward and backward pass of the layer with experts that do nothing."""
    temporaries_ratio: Annotated[float, number("their temporaries over the experts' rows", "{:.1f}".format)]
    """Peak bytes of routing and moves, without arguments and results, over the bytes of the experts' rows."""
    expert_rows: int
    """The result of `count_rows`."""
    tokens: int
    capacity_factor: float


@dataclass(frozen=True)
class AssignmentRow:
    """Median time of a balanced assignment."""

    algorithm: Annotated[str, text("balanced assignment")]
    tokens: Annotated[int, number("tokens", "{:,}".format)]
    experts: Annotated[int, number("experts")]
    milliseconds: Annotated[float, number("ms", "{:.1f}".format)]


def add_flags(parser: ArgumentParser) -> None:
    add_repeats(parser, 7)
    widths, dtypes = [256, 512, 1024], ["float32", "bfloat16"]
    parser.add_argument("--d_model", type=int, nargs="+", default=widths, metavar="D", help="widths; d_ff is 4 D")
    parser.add_argument("--dtype", nargs="+", default=dtypes, metavar="T", help="of all arrays: float32, bfloat16")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], metavar="E", help="8, 16, 64, 128 or 512")
    parser.add_argument("--dispatch", nargs="+", default=["gather"], choices=FORMS, help="forms of dispatch")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="tokens of all groups together")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[Row]:
    """Times the layers that the flags name, then balanced assignment."""
    cases = cases_of(flags.experts)
    for case in cases:
        fits = flags.tokens >= 1 and flags.tokens % case.num_tokens == 0
        require(fits, f"--tokens={flags.tokens} is no multiple of the {case.num_tokens} tokens of a group")
    for d_model, dtype, case in itertools.product(flags.d_model, flags.dtype, cases):
        yield from time_layer(case, flags.tokens, LayerSizes(d_model, dtype), flags.dispatch, flags.repeats)
    yield from time_assignment(ASSIGNED, -(-flags.tokens // ASSIGNED.num_tokens), flags.repeats)


class _Identity(nnx.Module):
    """An expert that does nothing: routing, dispatch and combine are what is left of the layer."""

    def __call__(
        self, x: Float[Array, "N D"], key: PRNGKeyArray | None, matmul: Callable[..., Array] | None = None
    ) -> Float[Array, "N D"]:
        return x


def _make_layer(case: LayerCase, model: ModelConfig, dispatch: str, routing_alone: bool = False) -> MoELayer:
    make_expert = (lambda key: _Identity()) if routing_alone else partial(FeedForward, model, 0.0)
    return MoELayer(make_expert, model.d_model, _moe_config(case, dispatch), jax.random.key(0))


def time_layer(
    case: LayerCase, num_tokens: int, sizes: LayerSizes, dispatches: Sequence[str], repeats: int
) -> list[LayerRow]:
    """Times the layer in each form of dispatch, its routing alone, and the dense network, in interleaved rounds.

    `num_tokens` counts the tokens of all groups and is a multiple of `case.num_tokens`.
    """
    model, key, groups = sizes.model, jax.random.key(0), num_tokens // case.num_tokens
    layers: dict[str, nnx.Module] = {"dense": FeedForward(model, 0.0, key)}
    for dispatch in dispatches:
        layers[dispatch] = _make_layer(case, model, dispatch)
        layers[f"{dispatch} routing"] = _make_layer(case, model, dispatch, routing_alone=True)
    x = jax.random.normal(key, (groups, case.num_tokens, model.d_model), model.dtype)
    one_way = _compile(jax.jit(_apply), {name: layers[name] for name in ("dense", *dispatches)}, x)
    two_ways = _compile(jax.jit(_gradient), layers, x)
    forward, both = (
        interleaved_seconds({name: partial(program, layers[name], x) for name, program in compiled.items()}, repeats)
        for compiled in (one_way, two_ways)
    )

    def make_row(dispatch: str) -> LayerRow:
        rows = count_rows(case, groups, dispatch)

        def over_dense(times: Mapping[str, Sequence[float]]) -> Ratio:
            return Ratio.of(times[dispatch], [rows / num_tokens * seconds for seconds in times["dense"]])

        return LayerRow(
            sizes=sizes,
            case=case,
            dispatch=dispatch,
            dense_forward_ms=1000 * statistics.median(forward["dense"]),
            forward_ratio=over_dense(forward),
            dense_both_ms=1000 * statistics.median(both["dense"]),
            both_ratio=over_dense(both),
            routing_ms=1000 * statistics.median(both[f"{dispatch} routing"]),
            temporaries_ratio=_temporaries_ratio(two_ways[f"{dispatch} routing"], rows, model),
            expert_rows=rows,
            tokens=num_tokens,
            capacity_factor=CAPACITY_FACTOR,
        )

    return [make_row(dispatch) for dispatch in dispatches]


def plan_layer(
    case: LayerCase, num_tokens: int, sizes: LayerSizes, dispatch: str, device: jax.Device
) -> tuple[float, float]:
    """Compiles the layer, forwards and backwards, for a device that need not be attached.

    Returns:
        The layer's FLOPs over those of its experts' products, and the temporaries of its routing alone over the bytes
        of the experts' rows.
    """
    model, groups, place = sizes.model, num_tokens // case.num_tokens, SingleDeviceSharding(device)
    rows = count_rows(case, groups, dispatch)

    def compile_on_device(layer: MoELayer) -> jax.stages.Compiled:
        x = jax.ShapeDtypeStruct((groups, case.num_tokens, model.d_model), model.dtype, sharding=place)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), layer)
        return jax.jit(_gradient, out_shardings=place).lower(shapes, x).compile()

    whole, routing = (compile_on_device(_make_layer(case, model, dispatch, alone)) for alone in (False, True))
    # Two matrices; one product forwards and two backwards with each; 2 FLOPs for each multiplication and addition.
    products = 2 * 3 * 2 * rows * model.d_model * model.d_ff
    return (whole.cost_analysis() or {})["flops"] / products, _temporaries_ratio(routing, rows, model)


def _moe_config(case: LayerCase, dispatch: Any) -> MoEConfig:
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
    """Compiles `function(layer, x)` for all layers in parallel."""
    lowered = [function.lower(layer, x) for layer in layers.values()]
    with ThreadPoolExecutor() as pool:
        return dict(zip(layers, pool.map(jax.stages.Lowered.compile, lowered), strict=True))


def count_rows(case: LayerCase, groups: int, dispatch: str) -> int:
    """Rows that the experts compute: all slots, or each token's choices in a dropless layer."""
    config = _moe_config(case, dispatch)
    if config.dropless:
        return groups * case.num_tokens * case.num_selected
    return groups * case.num_experts * capacity_of(config, case.num_experts, case.num_tokens, training=False)


def _temporaries_ratio(program: jax.stages.Compiled, rows: int, model: ModelConfig) -> float:
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes / (rows * model.d_model * jnp.dtype(model.dtype).itemsize) if memory else 0.0


def _apply(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], RoutingReport]:
    if isinstance(layer, MoELayer):
        return layer(x, jnp.ones(x.shape[:2], bool), None)
    return layer(x, None), RoutingReport({"load_balance_loss": jnp.zeros(())})


def _loss(layer: Any, x: Float[Array, "B L D"]) -> tuple[Float[Array, ""], RoutingReport]:
    y, report = _apply(layer, x)
    return jnp.sum(jnp.square(y.astype(jnp.float32))) + report.losses["load_balance_loss"], report


_gradient = jax.grad(_loss, argnums=(0, 1), has_aux=True)


def time_assignment(case: LayerCase, groups: int, repeats: int) -> list[AssignmentRow]:
    """Times the balanced assignment of `groups` groups of tokens with normal scores, by each algorithm in turn."""
    scores = jax.random.normal(jax.random.key(0), (groups, case.num_tokens, case.num_experts))
    mask = jnp.ones(scores.shape[:2], bool)
    capacity, rounds = -(-case.num_tokens // case.num_experts), BaseOptions().auction_rounds
    auction = jax.jit(partial(balanced_assignment, capacity=capacity, max_rounds=rounds))
    plan = jax.jit(partial(sinkhorn, iterations=SinkhornOptions().sinkhorn_iterations))
    programs = {"auction": partial(auction, scores, mask), "sinkhorn": partial(plan, scores, mask)}
    return [
        AssignmentRow(name, groups * case.num_tokens, case.num_experts, 1000 * statistics.median(times))
        for name, times in interleaved_seconds(programs, repeats).items()
    ]
