"""The run: set up or resume, step, log, evaluate, checkpoint, summarise."""

import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from switchjax.config import Config, UserError
from switchjax.data.data import Data
from switchjax.data.images import ImageData
from switchjax.data.prepare import prepare_data
from switchjax.models.model import Batch, Model
from switchjax.models.parameters import count_trained
from switchjax.parallel.mesh import check_fit, make_mesh, one_at_a_time
from switchjax.parallel.processes import exchange, first_then_others, process_index
from switchjax.parallel.sharding import partition_spec, process_rows
from switchjax.parallel.shutdown import Watchdog, closing_together
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.clock import Clock, StepCost, device_memory
from switchjax.training.hash_tables import with_hash_tables
from switchjax.training.metrics import MetricsWriter, Progress, read_metrics
from switchjax.training.non_finite import SkippedSteps
from switchjax.training.preemption import Preempted, Preemption, preemption
from switchjax.training.state import StatePlan, TrainState, plan_state
from switchjax.training.step import Metrics, lower_train_step
from switchjax.training.trace import Trace
from switchjax.training.workdir import (
    exclusive_run,
    load_vocabulary,
    open_workdir,
    record_run,
    vocabulary_path,
    with_corpora,
    write_summary,
)

_log = logging.getLogger(__name__)

Evaluator = Callable[[Model, Callable[[], None]], dict[str, float]]
"""Metrics of a model on held-out data. The second argument is called before each batch, and raises to drop the rest."""
MakeEvaluator = Callable[[Config, Data, Mesh], Evaluator]
"""Prepares the held-out evaluation of a run."""
MakeCost = Callable[[Config, Mesh], StepCost]
"""Accounts for a train step."""


def train(
    config: Config,
    workdir: Path,
    make_evaluator: MakeEvaluator,
    make_cost: MakeCost | None = None,
    interrupted_exit_code: int = 0,
) -> dict[str, Any]:
    """Trains until `config.train.steps`, from the last checkpoint of `workdir` if it has one.

    SIGTERM, to any of several processes, saves a checkpoint and returns early; while there is nothing to save, it ends
    the process.

    Args:
        config: of the run.
        workdir: of the run.
        make_evaluator: as `MakeEvaluator`.
        make_cost: as `MakeCost`; without it, metrics tell of no FLOPs.
        interrupted_exit_code: of the process, where SIGTERM ends it.

    Returns:
        What `summary.json` holds when the run is complete; or else, and in all processes but the first, the step that
        it has reached.

    Raises:
        UserError: if the config does not fit the devices, the data or what `workdir` holds, if `workdir` cannot be
            written (a full disk) or another process trains in it, or (`NonFiniteError`) the loss is no longer finite.
    """
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    plan = plan_state(config, mesh)  # builds the model's shapes, and so refuses what it cannot be built from
    config = open_workdir(workdir, config)
    with ExitStack() as resources:
        # Of the processes of one run, the first holds the workdir for them all.
        first_then_others(lambda: process_index() or resources.enter_context(exclusive_run(workdir)))
        stop = resources.enter_context(preemption(interrupted_exit_code))
        data = prepare_data(config.data)
        # What is recorded: a corpus that could not be had today may be there when the run is resumed.
        config = with_corpora(config, data.corpora)
        plan = dataclasses.replace(plan, config=config)
        _check_data(config, data)
        resources.enter_context(jax.set_mesh(mesh))
        clock = Clock(make_cost(config, mesh) if make_cost else None)
        with closing_together(_start(config, workdir, data, mesh, plan, clock)) as run:
            return run.finish() if run.complete else _loop(run, make_evaluator(config, data, mesh), stop)


def _check_data(config: Config, data: Data) -> None:
    """Refuses data of more ids or classes, or of other images, than the model has been built for."""
    model = config.model
    if data.vocabulary is not None and data.vocabulary.size > model.vocab_size:
        raise UserError(
            f"the vocabulary has {data.vocabulary.size} ids, model.vocab_size={model.vocab_size} is too small"
        )
    if isinstance(data, ImageData):
        wanted = (model.image_size, model.image_size, model.image_channels)
        if data.image_shape != wanted or data.num_classes > model.num_classes:
            raise UserError(
                f"{', '.join(data.corpora)}: images of {data.image_shape} in {data.num_classes} classes, but the model "
                f"is for {wanted} in model.num_classes={model.num_classes}: set model.image_size, model.image_channels"
            )


@dataclass
class _Run:
    """A run on its way: what the loop reads and moves on."""

    config: Config
    workdir: Path
    data: Data
    mesh: Mesh
    state: TrainState
    step: int
    skipped: SkippedSteps
    batches: Any
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    watchdog: Watchdog
    compiled: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    clock: Clock
    trace: Trace
    pending: deque[tuple[int, Metrics]] = field(default_factory=deque)
    """Metrics that the devices may still be working on."""
    evaluated: int = 0
    """Step of the last evaluation."""

    @property
    def complete(self) -> bool:
        """Whether all steps are taken and the last is evaluated."""
        return self.step >= self.config.train.steps and self.evaluated == self.step

    def advance(self) -> None:
        """Takes one step; does not wait for the devices to finish it."""
        self.watchdog.mark(f"reading the batch of step {self.step + 1}")
        with self.clock.measure("data_wait"):
            batch = next(self.batches)
        self.watchdog.mark(f"computing step {self.step + 1}")
        with self.clock.measure("step"):
            self.state, metrics = one_at_a_time(self.compiled(self.state, place_batch(batch, self.mesh)))
        self.step += 1
        self.pending.append((self.step, metrics))

    def settle(self, keep: int) -> None:
        """Logs what is pending but for the last `keep` steps, and refuses or counts what is not finite."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            with self.clock.measure("step"):
                values = jax.device_get(metrics)
            norms, finite = values.pop("gradient_norms"), bool(values.pop("finite"))
            skipped = self.skipped.count(step, finite, values, norms, self.config.train)
            if skipped:
                self.progress.say(skipped)
            if self.config.train.non_finite == "skip":
                values["skipped_steps"] = self.skipped.total
            self.clock.count_step(int(values["tokens"]))
            shown = None
            if step % self.config.train.log_every == 0 or step == self.config.train.steps:
                speed = self.clock.lap()
                with self.clock.measure("logging"):
                    self.writer.write("train", step, values | speed | device_memory())
                shown = {"loss": f"{values['loss']:.3f}", "tokens/s": f"{speed['tokens_per_second']:.0f}"}
            self.progress.update(step, shown)

    def evaluate_if_due(self, evaluator: Evaluator, stop: Preemption) -> None:
        """Settles, and evaluates the present parameters, after the steps for which that is asked.

        SIGTERM cuts it short: then it is done when the run is resumed.
        """
        every, last = self.config.evaluate.every, self.config.train.steps
        due = self.step >= last or (every and self.step and self.step % every == 0)
        if not due or self.evaluated == self.step:
            return
        self.settle(0)
        self.watchdog.mark(None)
        with self.clock.measure("evaluation"):
            try:
                results = evaluator(self.state.model, stop.check)
            except Preempted:
                return
            self.writer.write("evaluate", self.step, results)
            self.evaluated = self.step
            self.progress.say(f"step {self.step}: held-out neg_log_perplexity {results['neg_log_perplexity']:.4f}")

    def save(self) -> None:
        """Settles, so that nothing that is not finite is ever saved, and starts writing a checkpoint."""
        self.settle(0)
        self.watchdog.mark(None)
        with self.clock.measure("checkpoint"):
            data = {
                "iterator": self.batches.get_state(),
                "fingerprint": self.data.fingerprint,
                "skipped": dataclasses.asdict(self.skipped),
            }
            self.checkpoints.save(self.state, data, self.config)

    def finish(self) -> dict[str, Any]:
        """Writes `summary.json`; what records tell is null where there are none, as after fewer steps than
        `train.log_every`."""
        self.checkpoints.wait()
        if process_index():
            return {"steps": self.step}
        train, evaluate = read_metrics(self.workdir, "train"), read_metrics(self.workdir, "evaluate")
        last = evaluate[-1] if evaluate else {}
        summary = {
            "steps": self.step,
            "parameters": count_trained(self.state.model),
            "corpora": list(self.data.corpora),
            "devices": self.mesh.size,
            "loss": train[-1]["loss"] if train else None,
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in train) if train else None,
            "evaluation": {name: value for name, value in last.items() if name not in ("kind", "step")},
        }
        write_summary(self.workdir, summary)
        return summary

    def close(self) -> None:
        """Waits for the checkpoint that is being written and closes the files."""
        self.watchdog.close()
        with closing(self.progress), closing(self.writer), closing(self.trace):
            self.checkpoints.close()


def _loop(run: _Run, evaluator: Evaluator, stop: Preemption) -> dict[str, Any]:
    config, last = run.config, run.config.train.steps
    # On real devices the next step is dispatched before the metrics of the last one are waited for.
    in_flight = 0 if jax.default_backend() == "cpu" else 1
    run.clock.lap()
    with stop.deferred():
        run.evaluate_if_due(evaluator, stop)  # what SIGTERM had cut short
        while run.step < last and not stop.reached(run.step):
            with run.trace.step(run.step + 1):
                run.advance()
                run.settle(in_flight)
            run.trace.stop_after(run.step, run.state)
            run.checkpoints.check()
            run.evaluate_if_due(evaluator, stop)
            if run.step % config.train.checkpoint_every == 0 and run.step < last:
                run.save()
        run.trace.close()
        run.save()
        run.checkpoints.wait()
    return run.finish() if run.complete else {"steps": run.step, "interrupted": True}


def _start(config: Config, workdir: Path, data: Data, mesh: Mesh, plan: StatePlan, clock: Clock) -> _Run:
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    batches = data.train_batches(process_rows(mesh, config.data.batch_size))
    restored = checkpoints.restore_latest(plan, data.fingerprint)
    skipped = SkippedSteps()
    if restored is None:
        state = _initial_state(config, plan, data)
    else:
        state, saved = restored
        batches.set_state(saved["iterator"])
        skipped = SkippedSteps(**saved.get("skipped", {}))
        _log.info("resuming %s from step %d", workdir, int(state.step))
    step = int(state.step)
    compiled: Callable[[TrainState, Batch], tuple[TrainState, Metrics]] = _nothing_to_do
    if step < config.train.steps:
        record_run(workdir, config, data.vocabulary)
        compiled = _compile(config, plan, mesh)
        exchange("compiled")  # the first to enter a step would give up waiting for the others after a while
    return _Run(
        config=config,
        workdir=workdir,
        data=data,
        mesh=mesh,
        state=state,
        step=step,
        skipped=skipped,
        batches=batches,
        checkpoints=checkpoints,
        writer=MetricsWriter(workdir, step),
        progress=Progress(step, config.train.steps),
        watchdog=Watchdog(config.train.step_timeout),
        compiled=compiled,
        clock=clock,
        trace=Trace(workdir, config.train),
        evaluated=_last_evaluation(workdir),
    )


def _last_evaluation(workdir: Path) -> int:
    """The step of it, which process 0, whose records these are, says to all."""
    records = read_metrics(workdir, "evaluate") if process_index() == 0 else []
    return int(exchange(str(max((record["step"] for record in records), default=0)))[0])


def _initial_state(config: Config, plan: StatePlan, data: Data) -> TrainState:
    state = plan.create()
    model, taken = state.model, set[str]()
    if config.init_from.workdir:
        source = Path(config.init_from.workdir)
        vocabulary = data.vocabulary
        if vocabulary is not None and load_vocabulary(source, config).fingerprint != vocabulary.fingerprint:
            raise UserError(f"{source} has another vocabulary: set data.vocabulary={vocabulary_path(source)}")
        with closing(Checkpoints(source)) as checkpoints:
            model, taken = checkpoints.load_matching(plan, model, config.init_from.step)
    return TrainState(state.step, with_hash_tables(model, config, data, taken), state.opt_state)


def _compile(config: Config, plan: StatePlan, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The train step, compiled ahead of its first batch; says how long that took and what memory a device needs."""
    started = time.perf_counter()
    compiled = lower_train_step(config, plan, mesh).compile()
    _log.info("compiled the train step in %.1f s", time.perf_counter() - started)
    memory = compiled.memory_analysis()
    if memory is not None:
        state, temporary = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
        _log.info("memory of a device: %.1f MB of state and batch, %.1f MB of temporaries", state, temporary)
    return compiled


def _nothing_to_do(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    raise AssertionError("the run is complete")


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Rows from the host, laid over the mesh."""
    sharding = NamedSharding(mesh, partition_spec("batch"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
