"""What a compiled program communicates: which collectives, how often, how many bytes, between which devices."""

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
    """What one device holds: the operands, or the result of an all-gather."""
    times: int
    """How often it runs in a step."""
    group: tuple[int, ...]
    """Positions in the mesh, counted along its last axis first, of the devices of one group; empty: all."""
    source: str


def collectives(program: Program) -> list[Collective]:
    """All collectives that run; an asynchronous pair counts as its start.

    The TPU compiler may do one in steps, each fused with other work: these have one channel, and count as one. It
    writes a reduce-scatter as an all-reduce whose result it slices, in a computation called all-reduce-scatter.
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
            size = max(shape.bytes for shape in instruction.shapes)  # a start's result holds its operand as well
        elif kind == "all-gather":
            size *= max(len(group), 1)
        elif kind == "all-reduce" and id(computation) in scatters:
            kind = "reduce-scatter"
        found.append(Collective(kind, size, times, group, instruction.source))
    return found


def axes_between(group: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh of these sizes along which the devices of a group differ; none for a device by itself."""
    places = np.unravel_index(group or range(math.prod(mesh.values())), tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place))


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step: how many, and their bytes on one device."""

    count: int
    bytes: int


def traffic(found: list[Collective]) -> dict[str, Traffic]:
    """The totals of each kind that occurs."""
    alike = {kind: [one for one in found if one.kind == kind] for kind in COLLECTIVES}
    return {
        kind: Traffic(sum(one.times for one in ones), sum(one.times * one.bytes for one in ones))
        for kind, ones in alike.items()
        if ones
    }


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first group of devices that communicate with one another; of a permutation, its first pair.

    XLA lists groups, `{{0,1},{2,3}}`, or counts them out, `[2,4]<=[4,2]T(1,0)`, or names axes of a mesh,
    `mesh['a'=4,'b'=2] {'b'}`, with its devices in another order, `mesh[...], device_ids=([2,4]T(1,0)) {'b'}`, or parts
    of axes, `{'a':(2)2}`: the group spans 2 of a's positions, inside 2 larger parts.
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
    """The first group along some axes, or parts of axes, of a mesh of devices."""
    parts = {name: (int(outer or 1), int(size or sizes[name])) for name, outer, size in _AXIS.findall(axes)}
    shape: list[int] = []
    for name, size in sizes.items():
        outer, part = parts.get(name, (1, 1))
        shape += [outer, part, size // (outer * part)]
    first = (0, slice(None), 0) * len(sizes)
    return tuple(devices.reshape(shape)[first].reshape(-1).tolist())


def _count_out(sizes: str, order: str | None) -> np.ndarray:
    """`arange` of these sizes, its axes in another order, flat."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def count_collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How often the compiled program names each kind of collective that it has."""
    operations = count_operations(compiled)
    return {name: operations[name] for name in COLLECTIVES if operations[name]}
