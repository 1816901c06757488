"""Times what a run does besides its steps: reading text, logging, checkpoints and the loop itself."""

import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import grain
import jax
import numpy as np

from switchjax.config import Config, EvaluateConfig, TrainConfig
from switchjax.data.prepare import prepare_data
from switchjax.data.rows import HostBatch
from switchjax.models.model import Batch
from switchjax.parallel.mesh import emulate_devices, make_mesh, one_at_a_time
from switchjax.parallel.sharding import place_batch
from switchjax.studies.flags import LoadConfig, add_repeats
from switchjax.studies.report import Figure, percent
from switchjax.studies.timing import Ratio, interleaved_seconds
from switchjax.studies.train_to_end import train_to_end
from switchjax.training.clock import Clock
from switchjax.training.metrics import read_metrics
from switchjax.training.state import TrainState, plan_state
from switchjax.training.step import Metrics, lower_train_step

BATCHES = 64
"""Batches read in a round: many more than the pipeline prepares ahead."""
STEPS = 4
"""Steps in a round."""
RUN = TrainConfig(steps=220, log_every=20, checkpoint_every=100)
"""The run whose loop is timed: one lap to warm up, then two checkpoints in 200 steps."""
_LOOP = f"logging every {RUN.log_every} steps, a checkpoint every {RUN.checkpoint_every}, the loop"
_percent = partial(percent, digits=2)


@dataclass(frozen=True)
class InputFigures:
    """Medians over rounds; `loop_fraction` comes from one run."""

    pipeline_tokens_per_second: Annotated[float, Figure("text pipeline, tokens/s", "{:,.0f}".format)]
    step_tokens_per_second: Annotated[float, Figure("train step, tokens/s", "{:,.0f}".format)]
    pipeline_over_step: Annotated[Ratio, Figure("pipeline over step", aim="at least 10")]
    data_wait_fraction: Annotated[float, Figure("waiting for data in training, of its time", _percent, aim="below 1 %")]
    ready_seconds: Annotated[float, Figure("data that is on disk already, ready after", "{:.2f} s".format)]
    loop_fraction: Annotated[float, Figure(_LOOP, _percent, aim="below 2 %")]


def add_flags(parser: ArgumentParser) -> None:
    add_repeats(parser, 7)


def measure(flags: Namespace, load: LoadConfig) -> Iterator[InputFigures]:
    """Times the quickstart's reading and its steps in turn, then both together as in training, then a run."""
    config, repeats = load("configs/quickstart.py:switch"), flags.repeats
    emulate_devices(config.mesh)
    prepare_data(config.data)  # fetches and tokenises where necessary, untimed
    started = time.perf_counter()
    data = prepare_data(config.data)
    prepared = time.perf_counter() - started
    mesh = make_mesh(config.mesh)
    plan = plan_state(config, mesh)
    with jax.set_mesh(mesh):
        compiled = lower_train_step(config, plan, mesh).compile()
        consumer = Consumer(data.train_batches(), lambda batch: place_batch(batch, mesh), compiled, plan.create())
        fixed = next(consumer.batches)
        read: list[int] = []
        programs = {
            "read": lambda: read.append(sum(consumer.read(BATCHES))),
            "step": lambda: [consumer.step(fixed) for _ in range(STEPS)],
        }
        seconds = interleaved_seconds(programs, repeats)
        waits = [consumer.train(STEPS) for _ in range(repeats)]
    yielded = [tokens / s for tokens, s in zip(read[-repeats:], seconds["read"], strict=True)]
    eaten = [STEPS * count_tokens(fixed) / s for s in seconds["step"]]
    speeds = statistics.median(yielded), statistics.median(eaten), Ratio.of(yielded, eaten)
    yield InputFigures(*speeds, statistics.median(waits), prepared, loop_fraction(config))


@dataclass
class Consumer:
    """A train step and the text pipeline that feeds it."""

    batches: grain.DatasetIterator[HostBatch]
    place: Callable[[HostBatch], Batch]
    compiled: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    state: TrainState

    def read(self, count: int) -> list[int]:
        """Reads batches without training on them; returns their numbers of tokens."""
        return [count_tokens(next(self.batches)) for _ in range(count)]

    def step(self, batch: HostBatch) -> int:
        """Takes one train step; returns the number of tokens in its metrics."""
        self.state, metrics = one_at_a_time(self.compiled(self.state, self.place(batch)))
        return int(metrics["tokens"])

    def train(self, count: int) -> float:
        """Takes `count` steps as a run does; returns the fraction of the time spent waiting for data."""
        clock = Clock()
        for _ in range(count):
            with clock.measure("data_wait"):
                batch = next(self.batches)
            with clock.measure("step"):
                self.step(batch)
        return clock.lap()["data_wait_fraction"]


def count_tokens(batch: HostBatch) -> int:
    """Counts the tokens of a batch without padding, like the metrics of a run."""
    return sum(int(np.sum(rows > 0)) for name, rows in batch.items() if name.endswith("segments"))


def loop_fraction(config: Config) -> float:
    """The fraction of the time of `RUN` that logging, metrics, checkpoints and the loop itself take."""
    config = replace(config, train=RUN, evaluate=EvaluateConfig(every=0, batches=1))
    with tempfile.TemporaryDirectory() as folder:
        train_to_end(config, Path(folder))
        return fraction_beside_steps(read_metrics(Path(folder), "train")[1:])


def fraction_beside_steps(laps: Sequence[Mapping[str, Any]]) -> float:
    """The fraction of the time of `laps` spent neither in steps nor waiting for data.

    All laps have equally many steps of equal length, so a lap's length is proportional to `1 / step_fraction`.
    """
    lengths = [1 / lap["step_fraction"] for lap in laps]
    beside = [1 - lap["step_fraction"] - lap["data_wait_fraction"] for lap in laps]
    return sum(part * length for part, length in zip(beside, lengths, strict=True)) / sum(lengths)
