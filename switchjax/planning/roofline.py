"""The least time that a step can take: by computing, by reading memory and by moving bytes between chips.

Each of the three is a bound of its own; a step that overlaps them perfectly takes as long as the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from switchjax.accounting.hardware import Slice
from switchjax.planning.hlo_collectives import Collective

Coordinates = tuple[int, ...]
"""A chip's position in the mesh of chips."""


@dataclass(frozen=True)
class Roofline:
    """Seconds a step, each as if nothing else had to be done."""

    compute_seconds: float
    hbm_seconds: float
    network_seconds: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute_seconds, "HBM": self.hbm_seconds, "network": self.network_seconds}
        return max(times, key=lambda name: times[name])


def roofline(
    flops: float, hbm_bytes: float, found: Sequence[Collective], slice_: Slice, coordinates: Sequence[Coordinates]
) -> Roofline:
    """The bounds of a program on a slice.

    Args:
        flops: of matrix products on one device, at the chip's peak in bfloat16.
        hbm_bytes: what one device reads and writes.
        found: the program's collectives.
        slice_: its chips.
        coordinates: the chip of each device, in the order of the mesh.
    """
    chip = slice_.chip
    network = sum(one.times * network_seconds(one, slice_, coordinates) for one in found)
    return Roofline(flops * chip.devices / chip.flops, hbm_bytes * chip.devices / chip.memory_bandwidth, network)


def network_seconds(collective: Collective, slice_: Slice, coordinates: Sequence[Coordinates]) -> float:
    """Seconds that the links between chips take for one collective, with b bytes on each of the chip's devices.

    A group of n chips spans s_d chips along dimension d of the mesh. A line of chips has l_d links across its middle in
    each direction, 2 where it closes into a ring and 1 where it does not, of w bytes/s each.

    - all-to-all: half of all bytes change sides across the middle of each line, a quarter of them either way. The
      longest dimension bounds it: `max_d s_d b / (4 l_d w)`; chips of other groups between those of one group send as
      much over the same links, which is why the span counts and not the group's own chips.
    - all-gather and reduce-scatter: each chip's links bring it the n - 1 parts that it lacks, through all the
      dimensions at once: `b (n - 1) / n / sum_d l_d w`.
    - all-reduce: a reduce-scatter and an all-gather, twice that.
    - collective-permute: all bytes over one link, `b / w`.

    Within a chip of two devices no time passes. Latency is left out: it matters for small collectives only.
    """
    chips = {coordinates[i] for i in collective.group} if collective.group else set(coordinates)
    if len(chips) < 2:
        return 0.0
    size, link = collective.bytes * slice_.chip.devices, slice_.chip.link_bandwidth
    spans = {d: span for d, line in enumerate(zip(*chips, strict=True)) if (span := max(line) - min(line) + 1) > 1}
    # Part of a ring is a line: the way around leads through other groups.
    links = {d: slice_.links(d) if span == slice_.shape[d] else 1 for d, span in spans.items()}
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        return max(span * size / (4 * links[d] * link) for d, span in spans.items())
    if collective.kind == "collective-permute":
        return size / link
    once = size * (len(chips) - 1) / len(chips) / (sum(links.values()) * link)
    return 2 * once if collective.kind == "all-reduce" else once
