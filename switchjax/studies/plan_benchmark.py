"""The published models on the smallest slices that train them, and how long their train steps take to compile."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import GIB, Chip, Slice, find_chip, parse_slice
from switchjax.accounting.utilization import model_flops
from switchjax.config import Config, ModelConfig, UserError
from switchjax.planning.plan import StepPlan, plan_step, smallest_fit
from switchjax.planning.report import show_count, show_seconds
from switchjax.planning.topology import describe_devices
from switchjax.studies.layer_benchmark import cases_of, plan_layer
from switchjax.studies.markdown import show_row

Load = Callable[[str, Sequence[str]], Config]
"""The config of a file in configs/ and its argument (`switch.py:c`), with overrides as on the command line."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A config to compile, as `plan.py` would be told to."""

    config: str
    overrides: tuple[str, ...] = ()
    """`section.key=value`."""
    topology: str = "v5p"
    """A chip, whose smallest slice that fits is sought, or a slice."""

    @property
    def arguments(self) -> list[str]:
        return [f"--config.{override}" for override in self.overrides]


_LARGE = ("model.remat=full",)
FITS = (
    Case("switch.py:base-128", ("model.remat=exchange",)),
    Case("switch.py:xxl-128", _LARGE),
    # With 2048 experts of at least 2 slots each, a group of fewer tokens has more slots than tokens.
    Case("switch.py:c", (*_LARGE, "moe.group_size=4096")),
    # The inputs of 32 layers for all 4M tokens of a batch at once would take 1 TiB.
    Case("mixtral.py:8x7b", (*_LARGE, "train.accumulation_steps=32")),
    Case("glam.py:64b-64e", (*_LARGE, "train.accumulation_steps=8")),
    Case("vmoe.py:h-14-every2", ("model.remat=exchange",)),
)
"""From the papers. Overrides: what activations too large for memory and groups too large for a shard need."""

# 788 tokens are 4 images, as many as a chip of 1024 has.
_V_MOE = Case("vmoe.py:l-16-every2", ("model.remat=exchange", "moe.group_size=788"), "v5p:2x2x4")
RATIOS = (
    ("24 layers to 4", 1.3, replace(_V_MOE, overrides=(*_V_MOE.overrides, "model.num_encoder_layers=4")), _V_MOE),
    ("1024 chips to 16", 1.5, _V_MOE, replace(_V_MOE, topology="v5p:8x8x16")),
)
"""What is compared, the ratio of compile times that it should stay below, the smaller and the larger case."""
_ROUNDS = 3
"""How often a step is compiled for its time, in turn with all that are compared."""
_CHIP = "v5e:1x1"
_LAYERS = cases_of([8, 64])
_LAYER_MODEL = ModelConfig(d_model=512, d_ff=2048, dtype="bfloat16")
TOKENS = 16384
"""Of the layers that are compiled alone."""


def tabulate_plans(load: Load, workdir: Path, report: Report) -> str:
    """Compiles every case of `FITS` and `RATIOS`, and MoE layers alone, and returns the three tables.

    Each plan is saved under `workdir` as soon as it is made, and made again only where its case or the versions of
    the compiler have changed.

    Args:
        load: as `Load`.
        workdir: of the plans.
        report: is told of each slice that is tried and each row that is finished.

    Raises:
        UserError: if no slice holds a step, the compiler is not there, or `workdir` cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: cannot make {workdir} ({error.strerror})") from None
    lines = [
        "| config | parameters | slice | chips | mesh d/e/m | a chip's memory, GiB | all-to-alls | a MoE layer "
        "| their bytes over the slots' | all-gathers | compute | HBM | network | MFU at most | compiled in |",
        "|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in FITS:
        lines.append(_fit_row(case, load(case.config, case.arguments), _planned(case, load, workdir, report)))
        report(lines[-1])
    lines += ["", "| compile time | slice | | slice | | ratio | aim |", "|---|---|---:|---|---:|---:|---:|"]
    compared = dict.fromkeys(case for _, _, *cases in RATIOS for case in cases)
    rounds = [{case: _planned(case, load, workdir, report, number) for case in compared} for number in range(_ROUNDS)]
    for name, aim, *cases in RATIOS:
        lines.append(_ratio_row(name, aim, *([plans[case] for plans in rounds] for case in cases)))
        report(lines[-1])
    layer = f"one MoE layer on {_CHIP}, forward + backward: E, S, K"
    lines += ["", f"| {layer} | dispatch | FLOPs over the experts' products | temporaries over the experts' rows |"]
    lines.append("|---|---|---:|---:|")
    device = describe_devices(parse_slice(_CHIP))[0]
    for sizes, dispatch in itertools.product(_LAYERS, ("gather", "einsum", "ragged")):
        found = plan_layer(sizes, TOKENS, _LAYER_MODEL, dispatch, device)
        lines.append(show_row([sizes, dispatch, f"{found[0]:.2f}", f"{found[1]:.1f}"]))
        report(lines[-1])
    return "\n".join(lines)


def _planned(case: Case, load: Load, workdir: Path, report: Report, number: int = 0) -> dict[str, Any]:
    """The `StepPlan` of a case, as a dictionary, compiled once a round, as that is long to come by."""
    path = workdir / f"{_file_name(case)}{f'-{number}' if number else ''}.json"
    described = json.loads(json.dumps({**asdict(case), "versions": _versions()}))
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["case"] == described:
            return saved["plan"]
    report(f"compiling {' '.join([case.config, *case.overrides])} for {case.topology}")
    found = asdict(_plan(load(case.config, case.arguments), case.topology, report))
    # In one move: a plan that was cut off while it is written would be read by the next run.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"case": described, "plan": found}, indent=2) + "\n")
    unfinished.replace(path)
    return found


def _versions() -> list[str]:
    """Of what compiles."""
    return [f"{name} {version(name)}" for name in ("jax", "libtpu") if find_spec(name)]


def _file_name(case: Case) -> str:
    parts = (case.config.replace(".py", ""), case.topology, *case.overrides)
    return "-".join(parts).replace(":", "_").replace("=", "_")


def _plan(config: Config, topology: str, report: Report) -> StepPlan:
    if ":" in topology:
        return plan_step(config, parse_slice(topology))
    return smallest_fit(config, find_chip(topology), report)


def _fit_row(case: Case, config: Config, plan: dict[str, Any]) -> str:
    slice_ = parse_slice(plan["topology"])
    memory, bounds = plan["memory_per_device"], plan["roofline"]
    counts = {kind: found["count"] for kind, found in plan["collectives"].items()}
    exchanges = counts.get("all-to-all", 0)
    layers = _routed_layers(config)
    each = exchanges / (config.train.accumulation_steps * sum(layers.values()))
    cells = [" ".join([f"`{case.config}`", *(f"`{override}`" for override in case.overrides)])]
    cells += [show_count(account(config).total), f"{plan['topology']}", f"{slice_.chips:,}"]
    cells += ["/".join(str(size) for size in plan["mesh"].values())]
    cells += [f"{memory['total'] / GIB:.1f} of {memory['capacity'] / GIB:.1f}"]
    cells += [f"{exchanges:,}", f"{each:.3g}"]
    cells += [f"{exchanged_bytes(plan) / (each * slot_bytes(config, plan)):.2f}"]
    cells += [f"{counts.get('all-gather', 0):,}"]
    cells += [show_seconds(bounds[f"{bound}_seconds"]) for bound in ("compute", "hbm", "network")]
    cells += [f"{100 * utilization(config, slice_, plan):.0f} %", f"{plan['compile_seconds']:.0f} s"]
    return show_row(cells)


def _routed_layers(config: Config) -> dict[str, int]:
    """MoE layers of each stack."""
    return {stack: sum(layer.num_experts > 0 for layer in config.layers(stack)) for stack in config.model.stacks}


def exchanged_bytes(plan: dict[str, Any]) -> int:
    """Of all-to-alls on one device in a step."""
    return plan["collectives"].get("all-to-all", {"bytes": 0})["bytes"]


def slot_bytes(config: Config, plan: dict[str, Any]) -> float:
    """What has to cross once for all MoE layers of a step, from and to one device: each of its tokens has
    `K * capacity_factor` slots of d_model numbers, without drops one for every expert."""
    moe = config.moe
    slots = moe.num_experts if moe.dropless else moe.num_selected_experts * moe.train_capacity_factor
    tokens = sum(count * config.stack_lengths[stack] for stack, count in _routed_layers(config).items())
    shards = plan["mesh"]["data"] * plan["mesh"]["expert"]
    width = jnp.dtype(config.model.dtype).itemsize
    return slots * tokens * config.data.batch_size / shards * config.model.d_model * width


def utilization(config: Config, slice_: Slice, plan: dict[str, Any]) -> float:
    """Model FLOPs utilisation (MFU) of a step that takes as long as the largest bound of its roofline: at most that."""
    chip: Chip = slice_.chip
    seconds = max(plan["roofline"][f"{bound}_seconds"] for bound in ("compute", "hbm", "network"))
    return model_flops(config) / (slice_.chips * chip.flops * seconds)


def _ratio_row(name: str, aim: float, *sides: Sequence[dict[str, Any]]) -> str:
    """Of the smaller and the larger case, the plans of all rounds."""
    cells, seconds = [name], []
    for plans in sides:
        seconds.append(statistics.median(plan["compile_seconds"] for plan in plans))
        cells += [plans[0]["topology"], f"{seconds[-1]:.0f} s"]
    return show_row([*cells, f"{seconds[1] / seconds[0]:.2f}", aim])
