"""Divides a stack's layers into repeating periods, each of which is compiled once as the body of a `lax.scan`."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from switchjax.config import Layer


class ScannedPeriods(NamedTuple):
    """The layers of one `lax.scan`: `period`, repeated `repeats` times."""

    period: tuple[Layer, ...]
    repeats: int


def scan_periods(layers: Sequence[Layer]) -> tuple[ScannedPeriods, ...]:
    """The division of a stack into scans with the fewest layers to compile and, among those, the fewest scans.

    All routed layers of a period have the same number of experts, so that their metrics stack. Alternating dense and
    MoE layers are one scan; a pyramid of expert counts is one scan for each count.
    """
    whole = tuple(layers)

    @cache
    def best(start: int) -> tuple[ScannedPeriods, ...]:
        if start == len(whole):
            return ()
        divisions = [
            (first, *best(start + len(first.period) * first.repeats)) for first in _possible_starts(whole[start:])
        ]
        return min(divisions, key=lambda scans: (sum(len(s.period) for s in scans), len(scans), -scans[0].repeats))

    return best(0)


def _possible_starts(layers: tuple[Layer, ...]) -> list[ScannedPeriods]:
    """Every period that `layers` can begin with, with every number of repeats."""
    starts = []
    for length in range(1, len(layers) + 1):
        period = layers[:length]
        if len({layer.num_experts for layer in period if layer.num_experts}) > 1:
            break
        repeats = 1
        while layers[length * repeats : length * (repeats + 1)] == period:
            repeats += 1
        starts += [ScannedPeriods(period, n) for n in range(1, repeats + 1)]
    return starts
