"""Times of programs that are run in turn, so that a machine's moods meet them all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

Program = Callable[[], Any]


def interleaved_seconds(programs: Mapping[str, Program], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds that each program took in each of `repeats` rounds, its results waited for; after one unmeasured round
    where `warm_up`."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(-1 if warm_up else 0, repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def median_times(programs: Mapping[str, Program], repeats: int) -> dict[str, float]:
    """Median milliseconds of each program."""
    times = interleaved_seconds(programs, repeats)
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


@dataclass(frozen=True)
class Ratio:
    """A ratio that was measured in several rounds: their median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Of two programs' measurements, round by round."""
        ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"
