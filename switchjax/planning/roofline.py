"""Computes the least time that a step can take: for computing, for reading memory, for moving bytes between chips.

Each of the three is a bound; a step that overlaps them perfectly takes as long as the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from switchjax.accounting.hardware import Slice
from switchjax.planning.hlo_collectives import Collective

Coordinates = tuple[int, ...]
"""A chip's position in the mesh of chips."""


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a step takes if it runs alone."""

    compute_seconds: float
    hbm_seconds: float
    network_seconds: float

    @property
    def bound(self) -> str:
        """The name of the part that takes longest."""
        times = {"compute": self.compute_seconds, "HBM": self.hbm_seconds, "network": self.network_seconds}
        return max(times, key=lambda name: times[name])


def roofline(
    flops: float, hbm_bytes: float, found: Sequence[Collective], slice_: Slice, coordinates: Sequence[Coordinates]
) -> Roofline:
    """The bounds of a program on a slice.

    Args:
        flops: FLOPs of matrix products on one device; they run at the chip's bfloat16 peak.
        hbm_bytes: bytes that one device reads and writes.
        found: the program's collectives.
        slice_: the chips.
        coordinates: the chip of each device, in the order of the mesh.
    """
    chip = slice_.chip
    network = sum(one.times * network_seconds(one, slice_, coordinates) for one in found)
    return Roofline(flops * chip.devices / chip.flops, hbm_bytes * chip.devices / chip.memory_bandwidth, network)


def network_seconds(collective: Collective, slice_: Slice, coordinates: Sequence[Coordinates]) -> float:
    """Seconds that the links between chips take for one collective, with b bytes on each of the chip's devices.

    A group of n chips spans s_d chips along dimension d of the mesh. A line of chips has l_d links of w bytes/s across
    its middle in each direction: 2 if it closes into a ring, otherwise 1.

    - all-to-all: half of all bytes cross the middle of each line, a quarter in either direction. The longest dimension
      bounds it: `max_d s_d b / (4 l_d w)`. The span counts, not the number of the group's chips: the chips of other
      groups in between send as much over the same links.
    - all-gather and reduce-scatter: each chip receives the n - 1 parts that it lacks over the links of all dimensions
      at once: `b (n - 1) / n / sum_d l_d w`.
    - all-reduce: a reduce-scatter and an all-gather, twice that.
    - collective-permute: all bytes over one link, `b / w`.

    Transfers inside a chip of two devices take no time. Latency is ignored: it matters for small collectives only.
    """
    chips = {coordinates[i] for i in collective.group} if collective.group else set(coordinates)
    if len(chips) < 2:
        return 0.0
    size, link = collective.bytes * slice_.chip.devices, slice_.chip.link_bandwidth
    spans = {d: span for d, line in enumerate(zip(*chips, strict=True)) if (span := max(line) - min(line) + 1) > 1}
    # A part of a ring is only a line: the way around belongs to other groups.
    links = {d: slice_.links(d) if span == slice_.shape[d] else 1 for d, span in spans.items()}
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        return max(span * size / (4 * links[d] * link) for d, span in spans.items())
    if collective.kind == "collective-permute":
        return size / link
    once = size * (len(chips) - 1) / len(chips) / (sum(links.values()) * link)
    return 2 * once if collective.kind == "all-reduce" else once
