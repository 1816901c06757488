"""Plans a config's train step on a slice of TPUs with the TPU compiler; no TPU needs to be attached."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from switchjax.accounting.hardware import Chip, Slice, show_bytes, slices
from switchjax.config import Config, UserError
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.planning.buffer_assignment import Held, compile_with_assignment, held_at_peak
from switchjax.planning.hlo import parse_compiled
from switchjax.planning.hlo_collectives import Traffic, collectives, traffic
from switchjax.planning.hlo_cost import matmul_flops
from switchjax.planning.hlo_memory import memory_traffic, saved_activations
from switchjax.planning.roofline import Roofline, roofline
from switchjax.planning.topology import choose_mesh, describe_devices, leaf_bytes, require_compiler, state_bytes
from switchjax.training.state import StatePlan, plan_state
from switchjax.training.step import lower_train_step

_HELD = 8
"""Number of kinds of arrays that a plan names."""
_SHRINKS = 0.8
"""On a larger slice, a step needs at least this share of its memory, summed over all chips."""


class OutOfMemory(UserError):
    """A step needs more memory than a device has."""

    def __init__(self, message: str, needed: float = 0):
        """`message` is one line; `needed` is the bytes on a device, or 0 if they are unknown."""
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    activations: int
    """Arrays that the forward pass's loops over layers keep for the backward pass; part of `temporaries`."""
    temporaries: int
    """All other arrays while the step runs: gradients, activations, buffers of collectives."""
    total: int
    """Arguments, results that do not reuse their memory, temporaries and the program itself."""
    capacity: int


@dataclass(frozen=True)
class StepPlan:
    """The compiled train step of a config on a slice."""

    topology: str
    mesh: dict[str, int]
    memory_per_device: DeviceMemory
    held_at_peak: tuple[Held, ...]
    """The largest temporaries at the peak of memory."""
    flops_per_device: int
    """FLOPs of one step's matrix products, including recomputation."""
    hbm_bytes_per_device: int
    collectives: dict[str, Traffic]
    compile_seconds: float
    roofline: Roofline


def plan_step(config: Config, slice_: Slice) -> StepPlan:
    """Compiles the train step for a slice, on the mesh of `choose_mesh`.

    Raises:
        OutOfMemory: if the step needs more memory than a device has.
        UserError: if libtpu is missing, or the config does not divide over the slice.
    """
    devices = describe_devices(slice_)
    mesh = make_mesh(choose_mesh(config, slice_, devices), devices)
    check_fit(config, mesh)
    plan = plan_state(config, mesh)
    _check_state(plan, slice_.chip)
    started = time.perf_counter()
    try:
        compiled, hlo_proto = compile_with_assignment(lower_train_step(config, plan, mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(explain_out_of_memory(str(error)), needed_bytes(str(error))) from None
    return _measure(compiled, hlo_proto, plan, mesh, slice_, time.perf_counter() - started)


def smallest_fit(config: Config, chip: Chip, report: Callable[[str], None]) -> StepPlan:
    """The plan for the chip's smallest slice whose memory holds the step; tries the slices from small to large.

    It does not compile for a slice that cannot hold the state, or holds less than the step needed on a smaller slice.
    `report` receives a line for each slice that is tried and each that does not fit.

    Raises:
        UserError: if no slice fits; says why the largest does not.
    """
    require_compiler()
    reason, needed = "", 0.0
    for slice_ in slices(chip):
        if slice_.devices * chip.memory < _SHRINKS * needed and slice_ != slices(chip)[-1]:
            continue
        report(f"trying {slice_.name}, {slice_.chips} chips")
        try:
            return plan_step(config, slice_)
        except OutOfMemory as error:
            reason, needed = str(error), max(needed, slice_.devices * error.needed)
        except UserError as error:
            reason = str(error)
        report(f"{slice_.name} does not fit: {reason}")
    raise UserError(f"no slice of {chip.name} fits; the largest: {reason}")


def _check_state(plan: StatePlan, chip: Chip) -> None:
    """Raises `OutOfMemory`, before compiling, if a device cannot hold the state and the largest gradient."""
    parameters, optimizer = state_bytes(plan)
    gradient = max(leaf_bytes(plan.shapes.model, plan.shardings.model))
    if parameters + optimizer + gradient > chip.memory:
        raise OutOfMemory(
            f"{show_bytes(parameters)} of parameters, {show_bytes(optimizer)} of optimiser and {show_bytes(gradient)} "
            f"of one gradient exceed the {show_bytes(chip.memory)} of a device"
        )


def needed_bytes(message: str) -> float:
    """The bytes that a program needs by the compiler's message, or 0 if it does not say."""
    found = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of", message)
    if found is None:
        return 0.0
    number, unit = found[1] or found[3], found[2] or found[4] or ""
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def explain_out_of_memory(message: str) -> str:
    """The compiler's message in one line: the memory needed, and the three largest arrays."""
    first = next((line for line in message.splitlines() if "memory" in line), message.splitlines()[0])
    largest = re.findall(r"Size: ([\d.]+[KMGT]?)\b.*?\n\s*Operator: op_name=\"([^\"]*)\"", message, re.DOTALL)
    shown = "; ".join(f"{size} of {source}" for size, source in largest[:3])
    return first.removeprefix("RESOURCE_EXHAUSTED: ").strip() + (f" Largest: {shown}" if shown else "")


def _measure(
    compiled: jax.stages.Compiled, hlo_proto: bytes, plan: StatePlan, mesh: Mesh, slice_: Slice, seconds: float
) -> StepPlan:
    program = parse_compiled(compiled)
    found = collectives(program)
    flops, hbm_bytes = matmul_flops(program), memory_traffic(program)
    coordinates = [tuple(device.coords[: len(slice_.shape)]) for device in mesh.devices.flat]
    parameters, optimizer = state_bytes(plan)
    stats = compiled.memory_analysis()
    assert stats is not None, "the TPU compiler always reports a program's memory"
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = DeviceMemory(
        parameters=parameters,
        optimizer=optimizer,
        activations=saved_activations(program),
        temporaries=stats.temp_size_in_bytes,
        total=held + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
        capacity=slice_.chip.memory,
    )
    if memory.total > memory.capacity:
        excess = show_bytes(memory.total - memory.capacity)
        raise OutOfMemory(f"the step takes {show_bytes(memory.total)}, {excess} more than a device has", memory.total)
    return StepPlan(
        topology=slice_.name,
        mesh=dict(mesh.shape),
        memory_per_device=memory,
        held_at_peak=tuple(held_at_peak(hlo_proto, program)[:_HELD]),
        flops_per_device=flops,
        hbm_bytes_per_device=hbm_bytes,
        collectives=traffic(found),
        compile_seconds=seconds,
        roofline=roofline(flops, hbm_bytes, found, slice_, coordinates),
    )
