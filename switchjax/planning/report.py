"""Shows a plan as text, and as the JSON of `plan.py --json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from switchjax.accounting.accounting import Accounting
from switchjax.accounting.hardware import show_bytes
from switchjax.accounting.published import PUBLISHED, published_figures
from switchjax.config import Config, UserError
from switchjax.planning.plan import StepPlan

_SPARE = 0.2
"""The share of a device's memory that a run should leave free for evaluation, checkpoints and fragmentation."""
_SHOWN = 5
"""Number of kinds of temporaries in the list."""


def show_accounting(accounting: Accounting) -> str:
    """A config's parameters and FLOPs, by arithmetic alone."""
    parts = sorted(accounting.parameters.items(), key=lambda part: -part[1])
    computed = sum(accounting.computed_flops.values())
    return "\n".join(
        [
            f"parameters              {show_count(accounting.total)}, of which a token meets "
            f"{show_count(accounting.active)}",
            f"                        {', '.join(f'{name} {show_count(size)}' for name, size in parts)}",
            f"forward FLOPs           {accounting.forward_flops:.4g} a sequence as papers count, {computed:.4g} with "
            "routers and empty slots",
            f"training FLOPs          {accounting.training_flops:.4g} in all steps, "
            f"{accounting.training_flops_6nd:.4g} by 6 N D",
        ]
    )


def show_estimate(accounting: Accounting, mesh: Mapping[str, int]) -> str:
    """Estimates what a device of a mesh holds and sends; the compiler knows better."""
    held, sent = asdict(accounting.memory), accounting.communication
    lines = [
        f"a device of {' x '.join(f'{axis} {size}' for axis, size in mesh.items())}, not compiled",
        f"  holds about           {show_bytes(sum(held.values()))}: "
        + ", ".join(f"{name} {show_bytes(size)}" for name, size in held.items()),
    ]
    if sent.all_to_all or sent.gradient_all_reduce:
        exchanged, reduced = show_bytes(sent.all_to_all), show_bytes(sent.gradient_all_reduce)
        lines.append(f"  sends in a step       all-to-all {exchanged}, gradients {reduced}")
    return "\n".join(lines)


def show_published(key: str, config: Config) -> list[str]:
    """A line for each figure that a paper prints of the model `key` (`switch:c`), and a note on differences."""
    lines = [
        f"published {one.figure:13} {one.printed}, here {show_count(one.ours)}: {'agrees' if one.agrees else 'DIFFERS'}"
        for one in published_figures(key, config)
    ]
    return [*lines, *([f"  {PUBLISHED[key].note}"] if lines and PUBLISHED[key].note else [])]


def accounting_dict(accounting: Accounting) -> dict[str, Any]:
    """The accounting as `plan.py --json` writes it."""
    return {
        "parameters": {"total": accounting.total, "active": accounting.active, "by_part": dict(accounting.parameters)},
        "flops": {
            "forward_per_sequence": accounting.forward_flops,
            "computed_per_sequence": sum(accounting.computed_flops.values()),
            "training": accounting.training_flops,
        },
        "estimate": {"memory": asdict(accounting.memory), "communication": asdict(accounting.communication)},
    }


def show_count(count: float) -> str:
    """A count with four digits and a unit: `1.571T`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:g}"


def show_plan(plan: StepPlan) -> str:
    """The compiled step, line by line."""
    memory, bounds = plan.memory_per_device, plan.roofline
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    free = 1 - memory.total / memory.capacity
    lines = [
        f"train step on {plan.topology}, mesh {mesh}; compiled in {plan.compile_seconds:.0f} s",
        f"  memory of a device    {show_bytes(memory.total)} of {show_bytes(memory.capacity)}, {free:.0%} free"
        + ("" if free >= _SPARE else f" (less than {_SPARE:.0%})"),
        f"    parameters          {show_bytes(memory.parameters)}",
        f"    optimizer           {show_bytes(memory.optimizer)}",
        f"    temporaries         {show_bytes(memory.temporaries)}, of these activations that wait for the backward "
        f"pass {show_bytes(memory.activations)}",
    ]
    for held in plan.held_at_peak[:_SHOWN]:
        lines.append(f"      {show_bytes(held.bytes):>10}        {held.count} x {held.shape}  {held.source}")
    lines.append(f"  FLOPs of a device     {plan.flops_per_device:.4g}")
    for kind, found in plan.collectives.items():
        lines.append(f"  {kind:21} {found.count} a step, {show_bytes(found.bytes)} on a device")
    times = {"compute": bounds.compute_seconds, "HBM": bounds.hbm_seconds, "network": bounds.network_seconds}
    shown = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in times.items())
    return "\n".join([*lines, f"  roofline              {shown}: bound by {bounds.bound}"])


def show_seconds(seconds: float) -> str:
    """Seconds, or milliseconds if it is less than one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object; raises a `UserError` if the file cannot be written."""
    try:
        path.write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json: cannot write {path} ({error.strerror})") from None
