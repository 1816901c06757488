"""What a run spends beside its steps: whether the text pipeline keeps up with them, and what the loop itself takes."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grain
import jax
import numpy as np

from switchjax.config import Config, EvaluateConfig, TrainConfig
from switchjax.data.prepare import prepare_data
from switchjax.data.rows import HostBatch
from switchjax.models.model import Batch
from switchjax.parallel.mesh import make_mesh, one_at_a_time
from switchjax.parallel.sharding import place_batch
from switchjax.studies.markdown import AIM_HEAD, show_row
from switchjax.studies.timing import Ratio, interleaved_seconds
from switchjax.training.clock import Clock
from switchjax.training.metrics import read_metrics
from switchjax.training.run import train
from switchjax.training.state import TrainState, plan_state
from switchjax.training.step import Metrics, lower_train_step

BATCHES = 64
"""Read in a round: many more than lie ready before they are asked for."""
STEPS = 4
"""Taken in a round."""
RUN = TrainConfig(steps=220, log_every=20, checkpoint_every=100)
"""Of the run whose loop is looked at: a lap of records to warm up, then two checkpoints in 200 steps."""


@dataclass
class Consumer:
    """A train step and what feeds it, each to be timed alone and both together."""

    batches: grain.DatasetIterator[HostBatch]
    place: Callable[[HostBatch], Batch]
    compiled: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    state: TrainState

    def read(self, count: int) -> list[int]:
        """The tokens of as many batches, which go no further."""
        return [count_tokens(next(self.batches)) for _ in range(count)]

    def step(self, batch: HostBatch) -> int:
        """One train step; the tokens that it says it has seen."""
        self.state, metrics = one_at_a_time(self.compiled(self.state, self.place(batch)))
        return int(metrics["tokens"])

    def train(self, count: int) -> float:
        """As many steps as a run takes them; the fraction of their time in which they waited for data."""
        clock = Clock()
        for _ in range(count):
            with clock.measure("data_wait"):
                batch = next(self.batches)
            with clock.measure("step"):
                self.step(batch)
        return clock.lap()["data_wait_fraction"]


def count_tokens(batch: HostBatch) -> int:
    """Tokens of a batch of text without padding, as the metrics of a run count them."""
    return sum(int(np.sum(rows > 0)) for name, rows in batch.items() if name.endswith("segments"))


def loop_fraction(config: Config) -> float:
    """What logging, metrics, checkpoints and the loop itself take of the time of the run `RUN`."""
    # One evaluation ends the run, after its last record.
    config = replace(config, train=RUN, evaluate=EvaluateConfig(every=0, batches=1))
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder))
        return fraction_beside_steps(read_metrics(Path(folder), "train")[1:])


def fraction_beside_steps(laps: Sequence[Mapping[str, float]]) -> float:
    """What is neither steps nor waiting for data, of the time of all `laps`; records of as many steps each.

    Steps take as long in every lap, so a lap takes as long as the inverse of their fraction of it.
    """
    lengths = [1 / lap["step_fraction"] for lap in laps]
    beside = [1 - lap["step_fraction"] - lap["data_wait_fraction"] for lap in laps]
    return sum(part * length for part, length in zip(beside, lengths, strict=True)) / sum(lengths)


def benchmark_input(config: Config, repeats: int, report: Callable[[str], None]) -> str:
    """Times reading and stepping in turn, both together as in training, then a run, and returns the table.

    Args:
        config: of text; its mesh is over all devices.
        repeats: rounds, whose medians count.
        report: is told what goes on.

    Raises:
        UserError: if the data or the devices do not fit the config.
    """
    prepare_data(config.data)  # fetches and tokenises, unless that has been done
    started = time.perf_counter()
    data = prepare_data(config.data)
    prepared = time.perf_counter() - started
    mesh = make_mesh(config.mesh)
    plan = plan_state(config, mesh)
    report("compiling the train step")
    with jax.set_mesh(mesh):
        compiled = lower_train_step(config, plan, mesh).compile()
        consumer = Consumer(data.train_batches(), lambda batch: place_batch(batch, mesh), compiled, plan.create())
        fixed = next(consumer.batches)
        read: list[int] = []
        programs = {
            "read": lambda: read.append(sum(consumer.read(BATCHES))),
            "step": lambda: [consumer.step(fixed) for _ in range(STEPS)],
        }
        report(f"{repeats} rounds")
        seconds = interleaved_seconds(programs, repeats)
        waits = [consumer.train(STEPS) for _ in range(repeats)]
    report(f"a run of {RUN.steps} steps")
    loop = loop_fraction(config)
    yielded = [tokens / s for tokens, s in zip(read[-repeats:], seconds["read"], strict=True)]
    eaten = [STEPS * count_tokens(fixed) / s for s in seconds["step"]]
    rows = [
        ("text pipeline, tokens/s", f"{statistics.median(yielded):,.0f}", ""),
        ("train step, tokens/s", f"{statistics.median(eaten):,.0f}", ""),
        ("pipeline over step", str(Ratio.of(yielded, eaten)), "at least 10"),
        ("waiting for data in training, of its time", f"{100 * statistics.median(waits):.2f} %", "below 1 %"),
        ("data that is on disk already, ready after", f"{prepared:.2f} s", ""),
        (
            f"logging every {RUN.log_every} steps, a checkpoint every {RUN.checkpoint_every}, the loop",
            f"{100 * loop:.2f} %",
            "below 2 %",
        ),
    ]
    return "\n".join([*AIM_HEAD, *map(show_row, rows)])
