"""A stack's layers as runs of repeating periods, each of which is compiled once."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from switchjax.config import Layer


class Run(NamedTuple):
    """The layers of `period`, `repeats` times over."""

    period: tuple[Layer, ...]
    repeats: int


def find_runs(layers: Sequence[Layer]) -> tuple[Run, ...]:
    """The division of a stack into runs that has the fewest layers to compile, and among those the fewest runs.

    All routed layers of a period have equally many experts, so that their metrics stack: a stack of dense and MoE
    layers in turn is one run, a pyramid of expert counts is a run a count.
    """
    whole = tuple(layers)

    @cache
    def best(start: int) -> tuple[Run, ...]:
        if start == len(whole):
            return ()
        divisions = [(run, *best(start + len(run.period) * run.repeats)) for run in _runs_from(whole[start:])]
        return min(divisions, key=lambda runs: (sum(len(run.period) for run in runs), len(runs), -runs[0].repeats))

    return best(0)


def _runs_from(layers: tuple[Layer, ...]) -> list[Run]:
    """The longest run of each period that `layers` may begin with."""
    runs = []
    for length in range(1, len(layers) + 1):
        period = layers[:length]
        if len({layer.num_experts for layer in period if layer.num_experts}) > 1:
            break
        repeats = 1
        while layers[length * repeats : length * (repeats + 1)] == period:
            repeats += 1
        runs += [Run(period, n) for n in range(1, repeats + 1)]
    return runs
