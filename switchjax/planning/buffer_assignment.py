"""Lists the arrays that a compiled program holds at the peak of its memory, from XLA's buffer assignment.

Without an attached TPU, `memory_analysis()` has no buffer assignment, but the compiler can dump it. jaxlib has no
Python classes for XLA's messages, so `_MESSAGES` declares the few fields that are read here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessages

from switchjax.planning.hlo import Instruction, Program, Shape
from switchjax.planning.hlo_memory import destination

_MESSAGES = {
    "HloProto": "optional BufferAssignment buffer_assignment = 3",
    "BufferAssignment": "repeated LogicalBuffer logical_buffers = 1; repeated HeapTrace heap_simulator_traces = 4",
    "LogicalBuffer": "optional int64 id = 1; optional int64 size = 2; optional Location defined_at = 3; "
    "optional int64 color = 4",
    "Location": "repeated int64 shape_index = 3",
    "HeapTrace": "repeated Event events = 1",
    "Event": "optional int64 kind = 1; optional int64 buffer_id = 2; optional string instruction_name = 4; "
    "optional int64 share_with_canonical_id = 5",
}
"""The part of XLA's `hlo.proto` that is read: message -> fields."""
_HBM = 0
"""The color of buffers in a device's main memory; others lie on the chip."""
_FREE, _SHARE = 1, 2
"""Kinds of events; 0 allocates."""


@dataclass(frozen=True)
class Held:
    """Arrays of one shape and origin that a device holds at the same time."""

    bytes: int
    """The sum over all of them, with their padding."""
    count: int
    shape: str
    source: str
    """`op_name` of the operation that makes them, or `as NAME` if they have the shape of the parameter NAME."""


def compile_with_assignment(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bytes]:
    """The compiled program, and its `HloProto` with the buffer assignment, from the compiler's dump.

    JAX's compilation cache must be off: a cached program dumps nothing.
    """
    with TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_proto": True})
        (path,) = Path(folder).glob("*after_optimizations.hlo.pb")
        return compiled, path.read_bytes()


def held_at_peak(hlo_proto: bytes, program: Program) -> list[Held]:
    """The temporaries in a device's main memory at the moment when they take most of it, largest first.

    Args:
        hlo_proto: from `compile_with_assignment`.
        program: the same program's parsed text, which says what the buffers hold.
    """
    assignment = _hlo_proto().FromString(hlo_proto).buffer_assignment
    buffers = {buffer.id: buffer for buffer in assignment.logical_buffers if buffer.color == _HBM}
    instructions = {name: made for body in program.computations.values() for name, made in body.items()}
    parameters = _parameter_names(program)
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in (event for trace in assignment.heap_simulator_traces for event in _peak(trace.events, buffers)):
        instruction, buffer = instructions[event.instruction_name], buffers[event.buffer_id]
        shape = _shape_at(instruction, buffer.defined_at.shape_index)
        name = parameters.get(shape.sizes) if len(shape.sizes) > 1 else None
        text = f"{shape.dtype}[{','.join(map(str, shape.sizes))}]"
        sizes[text, f"as {name}" if name else instruction.source].append(buffer.size)
    held = [Held(sum(found), len(found), shape, source) for (shape, source), found in sizes.items()]
    return sorted(held, key=lambda one: -one.bytes)


def _hlo_proto() -> Any:
    """The message class `HloProto`, made from `_MESSAGES`."""
    file = FileDescriptorProto(name="hlo.proto", syntax="proto3")
    for message, fields in _MESSAGES.items():
        added = file.message_type.add(name=message)
        for label, kind, name, number in re.findall(r"(\w+) (\w+) (\w+) = (\d+)", fields):
            scalar = kind[0].islower()
            type_ = {"type": f"TYPE_{kind.upper()}"} if scalar else {"type": "TYPE_MESSAGE", "type_name": kind}
            added.field.add(name=name, number=int(number), label=f"LABEL_{label.upper()}", **type_)
    return GetMessages([file])["HloProto"]


def _peak(events: Iterable[Any], buffers: Mapping[int, Any]) -> list[Any]:
    """The allocations at the moment when they take most bytes; buffers that share memory count once."""
    owners: dict[int, int] = {}
    users: Counter[int] = Counter()
    held: dict[int, Any] = {}
    total = most = 0
    peak: list[Any] = []
    for event in (event for event in events if event.buffer_id in buffers):
        shared = event.share_with_canonical_id if event.kind == _SHARE else event.buffer_id
        owner = owners.setdefault(event.buffer_id, owners.get(shared, shared))
        users[owner] += -1 if event.kind == _FREE else 1
        if event.kind == _FREE and not users[owner]:
            total -= buffers[held.pop(owner).buffer_id].size
        elif event.kind != _FREE and owner not in held:
            held[owner] = event
            total += buffers[event.buffer_id].size
            if total > most:
                most, peak = total, list(held.values())
    return peak


def _shape_at(instruction: Instruction, index: Sequence[int]) -> Shape:
    """The array of an instruction's result that a buffer holds."""
    if instruction.opcode.endswith("-start"):  # its result nests tuples of operands, results and transfer state
        return destination(instruction)
    return instruction.shapes[index[0] if index else 0]


def _parameter_names(program: Program) -> dict[tuple[int, ...], str]:
    """Sizes -> the first parameter of the model with these sizes on a device."""
    names: dict[tuple[int, ...], str] = {}
    for instruction in program.computations[program.entry].values():
        if instruction.opcode == "parameter" and instruction.source.startswith("state.model"):
            name = instruction.source.removeprefix("state.model.").removesuffix(".value")
            names.setdefault(instruction.shapes[0].sizes, name)
    return names
