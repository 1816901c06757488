"""A profiler's trace of some steps of a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from switchjax.config import TrainConfig

_log = logging.getLogger(__name__)


class Trace:
    """Traces host and devices in the steps that `train.trace_first_step` and `train.trace_steps` choose.

    The trace goes to `tensorboard/plugins/profile/step_N`, where xprof and TensorBoard's profile plugin find it. A run
    that is resumed within these steps traces the remaining ones.
    """

    def __init__(self, workdir: Path, config: TrainConfig) -> None:
        self._folder = workdir / "tensorboard"
        self._steps = range(config.trace_first_step, config.trace_first_step + config.trace_steps)
        self._first: int | None = None
        self._step = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks its block as the step `number`, counted from 1; starts the trace if it is the first to trace."""
        if number not in self._steps:
            yield
            return
        if self._first is None:
            options = jax.profiler.ProfileOptions()
            options.session_id = f"step_{number}"  # the same on all hosts, because their files belong together
            options.python_tracer_level = 0  # tracing every call of a Python function would slow the steps down
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._first = number
        self._step = number
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def stop_after(self, number: int, results: Any) -> None:
        """Writes the trace if step `number` is its last, after the devices have computed the step's `results`."""
        if self._first is not None and number >= self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace if one has started."""
        if self._first is None:
            return
        jax.profiler.stop_trace()
        folder, hint = f"plugins/profile/step_{self._first}", f"pip install xprof; xprof --logdir={self._folder}"
        _log.info("trace of steps %d to %d in %s/%s: %s", self._first, self._step, self._folder, folder, hint)
        self._first = None
