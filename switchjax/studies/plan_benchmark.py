"""Compiles published models for the smallest slices that train them, and times how long that takes.

Needs the TPU compiler, no TPU: pip install -c constraints.txt libtpu
"""

import itertools
import json
import logging
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import GIB, find_chip, parse_slice
from switchjax.accounting.utilization import model_flops
from switchjax.config import Config, UserError
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.plan import StepPlan, plan_step, smallest_fit
from switchjax.planning.report import show_count, show_seconds
from switchjax.planning.topology import describe_devices
from switchjax.studies.flags import LoadConfig
from switchjax.studies.layer_benchmark import FORMS, LayerCase, LayerSizes, cases_of, plan_layer
from switchjax.studies.report import Row, listed, number, percent, text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A config to compile, in the arguments of `plan.py`."""

    config: str
    overrides: tuple[str, ...] = ()
    """`section.key=value`."""
    topology: str = "v5p"
    """A slice, or a chip: then the study finds its smallest slice that fits."""

    @property
    def arguments(self) -> list[str]:
        """The overrides as on the command line."""
        return [f"--config.{override}" for override in self.overrides]


_LARGE = ("model.remat=full",)
FITS = (
    Case("switch.py:base-128", ("model.remat=exchange",)),
    Case("switch.py:xxl-128", _LARGE),
    # Smaller groups would have more slots than tokens: 2048 experts have at least 2 slots each.
    Case("switch.py:c", (*_LARGE, "moe.group_size=4096")),
    # Without micro-batches, the inputs of 32 layers take 1 TiB for the 4M tokens of a batch.
    Case("mixtral.py:8x7b", (*_LARGE, "train.accumulation_steps=32")),
    Case("glam.py:64b-64e", (*_LARGE, "train.accumulation_steps=8")),
    Case("vmoe.py:h-14-every2", ("model.remat=exchange",)),
)
"""Published models. Overrides make activations fit into memory and groups fit into a shard."""

# Each of 1024 chips has 4 images, which are 788 tokens.
_V_MOE = Case("vmoe.py:l-16-every2", ("model.remat=exchange", "moe.group_size=788"), "v5p:2x2x4")
RATIOS = (
    ("24 layers to 4", 1.3, replace(_V_MOE, overrides=(*_V_MOE.overrides, "model.num_encoder_layers=4")), _V_MOE),
    ("1024 chips to 16", 1.5, _V_MOE, replace(_V_MOE, topology="v5p:8x8x16")),
)
"""Name of the comparison, aim for the ratio of compile times, the smaller case, the larger case."""
_ROUNDS = 3
"""Compilations of each compared step."""
_CHIP = "v5e:1x1"
_LAYER_SIZES = LayerSizes(512, "bfloat16")
TOKENS = 16384
"""Tokens of a layer that is compiled alone."""


def _show_memory(memory: dict[str, int]) -> str:
    return f"{memory['total'] / GIB:.1f} of {memory['capacity'] / GIB:.1f}"


@dataclass(frozen=True)
class PlanRow:
    """A train step that the TPU compiler has compiled."""

    config: Annotated[str, text("config", lambda words: " ".join(f"`{word}`" for word in words.split()))]
    """The name and overrides of the case."""
    parameters: Annotated[int, number("parameters", show_count)]
    topology: Annotated[str, text("slice")]
    chips: Annotated[int, number("chips", "{:,}".format)]
    mesh: Annotated[dict[str, int], text("mesh d/e/m", lambda mesh: "/".join(map(str, mesh.values())))]
    memory_bytes: Annotated[dict[str, int], number("a chip's memory, GiB", _show_memory)]
    """The step's `total` and a chip's `capacity`."""
    all_to_alls: Annotated[int, number("all-to-alls", "{:,}".format)]
    all_to_alls_per_layer: Annotated[float, number("a MoE layer", "{:.3g}".format)]
    """In one micro-batch."""
    bytes_over_slots: Annotated[float, number("their bytes over the slots'", "{:.2f}".format)]
    all_gathers: Annotated[int, number("all-gathers", "{:,}".format)]
    compute_seconds: Annotated[float, number("compute", show_seconds)]
    hbm_seconds: Annotated[float, number("HBM", show_seconds)]
    network_seconds: Annotated[float, number("network", show_seconds)]
    mfu: Annotated[float, number("MFU at most", partial(percent, digits=0))]
    """Model FLOPs utilisation if the step takes no longer than the largest bound of its roofline."""
    compile_seconds: Annotated[float, number("compiled in", "{:.0f} s".format)]


@dataclass(frozen=True)
class CompileRatioRow:
    """Median compile times of a smaller and a larger step."""

    compared: Annotated[str, text("compile time")]
    small_topology: Annotated[str, text("slice")]
    small_seconds: Annotated[float, number("", "{:.0f} s".format)]
    large_topology: Annotated[str, text("slice")]
    large_seconds: Annotated[float, number("", "{:.0f} s".format)]
    ratio: Annotated[float, number("ratio", "{:.2f}".format)]
    aim: Annotated[float, number("aim")]


@dataclass(frozen=True)
class PlannedLayerRow:
    """One MoE layer that the TPU compiler has compiled."""

    case: Annotated[LayerCase, text(f"one MoE layer on {_CHIP}, forward + backward: E, S, K", listed)]
    dispatch: Annotated[str, text("dispatch")]
    flops_ratio: Annotated[float, number("FLOPs over the experts' products", "{:.2f}".format)]
    temporaries_ratio: Annotated[float, number("temporaries over the experts' rows", "{:.1f}".format)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of their configs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/plan"), help="one JSON file a plan")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[Row]:
    """Compiles every case of `FITS` and `RATIOS`, and MoE layers alone.

    The workdir keeps each plan's row until its case or the compiler's version changes.
    """
    jax.config.update("jax_platforms", "cpu")  # leaves the machine's accelerators alone
    jax.config.update("jax_enable_compilation_cache", False)  # measures real compile times
    try:
        flags.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: cannot make {flags.workdir} ({error.strerror})") from None
    for case in FITS:
        yield planned(case, flags, load)
    compared = dict.fromkeys(case for _, _, *cases in RATIOS for case in cases)
    rounds = [{case: planned(case, flags, load, number) for case in compared} for number in range(_ROUNDS)]
    for name, aim, *cases in RATIOS:
        topologies = [rounds[0][case].topology for case in cases]
        seconds = [statistics.median(rows[case].compile_seconds for rows in rounds) for case in cases]
        yield CompileRatioRow(name, topologies[0], seconds[0], topologies[1], seconds[1], seconds[1] / seconds[0], aim)
    device = describe_devices(parse_slice(_CHIP))[0]
    for sizes, dispatch in itertools.product(cases_of([8, 64]), FORMS):
        yield PlannedLayerRow(sizes, dispatch, *plan_layer(sizes, TOKENS, _LAYER_SIZES, dispatch, device))


def compiler_versions() -> list[str]:
    """The versions of the packages that compile."""
    return [f"{name} {version(name)}" for name in ("jax", "libtpu") if find_spec(name)]


def planned(case: Case, flags: Namespace, load: LoadConfig, number: int = 0) -> PlanRow:
    """Compiles a case, or reads its saved row; each `number` is a compilation of its own."""
    name = "-".join((case.config.replace(".py", ""), case.topology, *case.overrides))
    path = flags.workdir / f"{name.replace(':', '_').replace('=', '_')}{f'-{number}' if number else ''}.json"
    described = json.loads(json.dumps({**asdict(case), "versions": compiler_versions()}))
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["case"] == described and "row" in saved:
            return PlanRow(**saved["row"])
    _log.info("compiling %s for %s", " ".join([case.config, *case.overrides]), case.topology)
    config = load(str(flags.configs / case.config), case.arguments)
    if ":" in case.topology:
        row = make_row(case, config, plan_step(config, parse_slice(case.topology)))
    else:
        row = make_row(case, config, smallest_fit(config, find_chip(case.topology), _log.info))
    # Written aside, then renamed: an interrupted write leaves no file that the next run reads.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"case": described, "row": asdict(row)}, indent=2) + "\n")
    unfinished.replace(path)
    return row


def make_row(case: Case, config: Config, plan: StepPlan) -> PlanRow:
    """Makes the row of a compiled case."""
    slice_, memory, bounds = parse_slice(plan.topology), plan.memory_per_device, plan.roofline
    exchanges, gathers = (plan.collectives.get(kind, Traffic(0, 0)) for kind in ("all-to-all", "all-gather"))
    per_layer = exchanges.count / (config.train.accumulation_steps * sum(_routed_layers(config).values()))
    seconds = max(bounds.compute_seconds, bounds.hbm_seconds, bounds.network_seconds)
    return PlanRow(
        config=" ".join([case.config, *case.overrides]),
        parameters=account(config).total,
        topology=plan.topology,
        chips=slice_.chips,
        mesh=plan.mesh,
        memory_bytes={"total": memory.total, "capacity": memory.capacity},
        all_to_alls=exchanges.count,
        all_to_alls_per_layer=per_layer,
        bytes_over_slots=exchanges.bytes / (per_layer * slot_bytes(config, plan.mesh)),
        all_gathers=gathers.count,
        **asdict(bounds),
        mfu=model_flops(config) / (slice_.chips * slice_.chip.flops * seconds),
        compile_seconds=plan.compile_seconds,
    )


def _routed_layers(config: Config) -> dict[str, int]:
    """Stack -> number of its MoE layers."""
    return {stack: sum(layer.num_experts > 0 for layer in config.layers(stack)) for stack in config.model.stacks}


def slot_bytes(config: Config, mesh: Mapping[str, int]) -> float:
    """Bytes that one device must send once, or receive once, for all MoE layers of a step.

    Each of its tokens has `K * capacity_factor` slots of d_model numbers; in dropless layers, one for every expert.
    """
    moe = config.moe
    slots = moe.num_experts if moe.dropless else moe.num_selected_experts * moe.train_capacity_factor
    tokens = sum(count * config.stack_lengths[stack] for stack, count in _routed_layers(config).items())
    rows = config.data.batch_size / (mesh["data"] * mesh["expert"])
    return slots * tokens * rows * config.model.d_model * jnp.dtype(config.model.dtype).itemsize
