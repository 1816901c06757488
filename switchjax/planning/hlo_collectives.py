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
    """What one device holds of it: the operands, of an all-gather the result."""
    times: int
    """How often it runs in a step."""
    group: tuple[int, ...]
    """Positions in the mesh, counted along its last axis first, of the devices of one group; empty: all of them."""
    source: str


def collectives(program: Program) -> list[Collective]:
    """All that run; of an asynchronous pair the start.

    The TPU compiler may do one in steps, each fused with other work: these have one channel, and count as one. It
    writes a reduce-scatter as an all-reduce and what slices its result, in a computation called all-reduce-scatter.
    """
    found, chains = [], set()
    scatters = [body for name, body in program.computations.items() if name.startswith("all-reduce-scatter")]
    for computation, instruction, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            chain = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
            if chain and "chain_id=" in instruction.attributes:
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            group = replica_group(instruction.attributes)
            size = sum(computation[name].bytes for name in instruction.operands if name in computation)
            if kind == "all-gather":
                # Of a start, the shape holds the operand as well.
                size = (
                    max(shape.bytes for shape in instruction.shapes)
                    if len(instruction.operands) == 1
                    else (size * max(len(group), 1))
                )
            if kind == "all-reduce" and any(computation is body for body in scatters):
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
    """By kind, kinds without any left out."""
    totals = {}
    for kind in COLLECTIVES:
        alike = [one for one in found if one.kind == kind]
        if alike:
            totals[kind] = Traffic(sum(one.times for one in alike), sum(one.times * one.bytes for one in alike))
    return totals


def replica_group(attributes: str) -> tuple[int, ...]:
    """Devices that communicate with one another, the first group of them; of permuted pairs, the first.

    XLA lists groups, `{{0,1},{2,3}}`, or counts them out, `[2,4]<=[4,2]T(1,0)`, or names axes of a mesh,
    `mesh['a'=4,'b'=2] {'b'}`, with its devices in another order, `mesh[...], device_ids=([2,4]T(1,0)) {'b'}`, or parts
    of axes, `{'a':(2)2}`: of size 2 after 2 that are not of the group.
    """
    if listed := re.search(r"\breplica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(i) for i in listed[1].split(",") if i)
    if iota := re.search(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_counted(iota[2], iota[3])[: int(iota[1].split(",")[-1])])
    if named := re.search(r"\breplica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        sizes, order, axes = named.groups()
        positions = _mesh_group(dict(re.findall(r"'([^']+)'=(\d+)", sizes)), axes)
        if permuted := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
            devices = _counted(permuted[1], permuted[2])
            return tuple(devices[position] for position in positions)
        return positions
    if pairs := re.search(r"\bsource_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return tuple(int(i) for i in re.findall(r"\d+", pairs[1])[:2])
    return ()


def _mesh_group(sizes: dict[str, str], axes: str) -> tuple[int, ...]:
    group, stride = [0], math.prod(map(int, sizes.values()))
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(axes)}
    for name, size in sizes.items():
        stride //= int(size)
        if name in parts:
            before, part = parts[name]
            step = stride * (int(size) // (before * part))
            group = [start + i * step for start in group for i in range(part)]
    return tuple(group)


def _counted(sizes: str, order: str | None) -> list[int]:
    """`arange` of these sizes, its axes in another order, flat."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1).tolist()


def count_collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many of each kind of collective stand in the compiled program, kinds without any left out."""
    operations = count_operations(compiled)
    return {name: operations[name] for name in COLLECTIVES if operations[name]}
