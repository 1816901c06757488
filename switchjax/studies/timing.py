"""Times programs in turn, so that a change of the machine's speed affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

Program = Callable[[], Any]


def interleaved_seconds(programs: Mapping[str, Program], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds that each program takes in each of `repeats` rounds, until its results are ready.

    With `warm_up`, an unmeasured round comes first.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(-1 if warm_up else 0, repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    return times


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a ratio measured in several rounds; shown as `1.04 (1.03 to 1.06)`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """The ratio of two programs' measurements, round by round."""
        ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"
