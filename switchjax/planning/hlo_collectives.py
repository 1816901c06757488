"""Finds the collectives of a compiled program: their kind, number, bytes and groups of devices."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from switchjax.planning.hlo import Program, count_operations

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


class Collective(NamedTuple):
    """One instruction that communicates."""

    kind: str
    bytes: int
    """Bytes on one device: of the operands, or of the result of an all-gather."""
    times: int
    """Runs in a step."""
    group: tuple[int, ...]
    """Positions of one group's devices in the flattened (row-major) mesh; empty: all devices."""
    source: str


def collectives(program: Program) -> list[Collective]:
    """All collectives that run; an asynchronous pair counts once.

    The TPU compiler may split one collective into steps that it fuses with other work: they share a channel and count
    as one. It writes a reduce-scatter as an all-reduce with a sliced result, in a computation `all-reduce-scatter...`.
    """
    found, chains = [], set()
    scatters = [id(body) for name, body in program.computations.items() if name.startswith("all-reduce-scatter")]
    for computation, instruction, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        chain = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
        if chain and "chain_id=" in instruction.attributes:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        group = replica_group(instruction.attributes)
        size = sum(computation[name].bytes for name in instruction.operands if name in computation)
        if kind == "all-gather" and len(instruction.operands) == 1:
            size = max(shape.bytes for shape in instruction.shapes)  # a start's result also holds its operand
        elif kind == "all-gather":
            size *= max(len(group), 1)
        elif kind == "all-reduce" and id(computation) in scatters:
            kind = "reduce-scatter"
        found.append(Collective(kind, size, times, group, instruction.source))
    return found


def axes_between(group: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; none for a single device."""
    places = np.unravel_index(group or range(math.prod(mesh.values())), tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place))


@dataclass(frozen=True)
class Traffic:
    """Number of collectives of one kind in a step, and their bytes on one device."""

    count: int
    bytes: int


def traffic(found: list[Collective]) -> dict[str, Traffic]:
    """Kind -> totals, for each kind that occurs."""
    alike = {kind: [one for one in found if one.kind == kind] for kind in COLLECTIVES}
    return {
        kind: Traffic(sum(one.times for one in ones), sum(one.times * one.bytes for one in ones))
        for kind, ones in alike.items()
        if ones
    }


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first group of devices that communicate with one another, or the first pair of a permutation.

    XLA has several notations: a list of groups, `{{0,1},{2,3}}`; a reshaped and transposed range, `[2,4]<=[4,2]T(1,0)`;
    axes of a mesh, `mesh['a'=4,'b'=2] {'b'}`, perhaps with its devices in another order,
    `mesh[...], device_ids=([2,4]T(1,0)) {'b'}`; or parts of axes, `{'a':(2)2}`: the group spans 2 of a's positions,
    inside 2 larger parts.
    """
    if listed := re.search(r"\b(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return tuple(int(i) for i in listed[1].split(",") if i)
    if iota := re.search(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_count_out(iota[2], iota[3])[: int(iota[1].split(",")[-1])].tolist())
    if named := re.search(r"\breplica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2])
        devices = _count_out(order[1], order[2]) if order else np.arange(math.prod(sizes.values()))
        return _mesh_group(devices, sizes, named[3])
    return ()


def _mesh_group(devices: np.ndarray, sizes: Mapping[str, int], axes: str) -> tuple[int, ...]:
    """The first group along axes, or parts of axes, of a mesh of devices."""
    parts = {name: (int(outer or 1), int(size or sizes[name])) for name, outer, size in _AXIS.findall(axes)}
    shape: list[int] = []
    for name, size in sizes.items():
        outer, part = parts.get(name, (1, 1))
        shape += [outer, part, size // (outer * part)]
    first = (0, slice(None), 0) * len(sizes)
    return tuple(devices.reshape(shape)[first].reshape(-1).tolist())


def _count_out(sizes: str, order: str | None) -> np.ndarray:
    """A flat `arange` of these sizes after its axes are transposed."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def count_collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Kind -> number of its instructions in the compiled program, for each kind that occurs."""
    operations = count_operations(compiled)
    return {name: operations[name] for name in COLLECTIVES if operations[name]}
