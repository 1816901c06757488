"""Measures where the time of a run goes and how fast its devices compute."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from switchjax.accounting.utilization import StepCost

_STEPS = ("data_wait", "step", "logging")
"""Parts of training: waiting for a batch, computing, writing metrics."""
_BETWEEN = ("evaluation", "checkpoint")
"""Parts that interrupt training; the speed leaves them out."""


class Clock:
    """Time, tokens and steps since the last log record."""

    def __init__(self, cost: StepCost | None = None) -> None:
        self._cost = cost
        self._start()

    def _start(self) -> None:
        self._seconds = dict.fromkeys((*_STEPS, *_BETWEEN), 0.0)
        self._steps = self._tokens = 0
        self._started = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time of its block to `part`: data_wait, step, logging, evaluation or checkpoint."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - started

    def count_step(self, tokens: int) -> None:
        """Counts a step that the devices have finished."""
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> dict[str, float]:
        """Metrics of the time since the last lap; starts the next lap.

        Returns:
            `tokens_per_second`, `model_flops_per_second` and, if the devices' peak is known, `mfu` (model FLOPs
            utilisation), without the time of evaluation and checkpoints; and for each part of `measure`,
            `PART_fraction` of all the time.
        """
        passed = time.perf_counter() - self._started
        training = passed - sum(self._seconds[part] for part in _BETWEEN)
        metrics = {"tokens_per_second": self._tokens / training}
        if self._cost is not None:
            metrics["model_flops_per_second"] = self._cost.flops * self._steps / training
            if self._cost.peak_flops is not None:
                metrics["mfu"] = metrics["model_flops_per_second"] / self._cost.peak_flops
        metrics |= {f"{part}_fraction": seconds / passed for part, seconds in self._seconds.items()}
        self._start()
        return metrics


def device_memory() -> dict[str, float]:
    """`device_peak_bytes`, the most memory that a device of this process has used; empty if devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [float(found["peak_bytes_in_use"]) for found in stats if "peak_bytes_in_use" in found]
    return {"device_peak_bytes": max(peaks)} if peaks else {}
