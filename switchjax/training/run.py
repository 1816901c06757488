"""The run: start or resume, then step, log, evaluate and save until the last step."""

import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from switchjax.accounting.utilization import step_cost
from switchjax.config import Config, UserError
from switchjax.data.data import Data
from switchjax.data.images import ImageData
from switchjax.data.prepare import prepare_data
from switchjax.models.model import Batch
from switchjax.models.parameters import count_trained
from switchjax.parallel.mesh import check_fit, make_mesh, one_at_a_time
from switchjax.parallel.processes import all_values, first_then_others, process_count, process_index
from switchjax.parallel.sharding import place_batch, process_rows
from switchjax.parallel.shutdown import Watchdog, closing_together
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.clock import Clock, device_memory
from switchjax.training.evaluation import Evaluator
from switchjax.training.hash_tables import with_hash_tables
from switchjax.training.metrics import MetricsWriter, Progress, read_metrics
from switchjax.training.non_finite import SkippedSteps
from switchjax.training.preemption import Preempted, preemption
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

CompiledStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train(config: Config, workdir: Path, interrupted_exit_code: int = 0) -> dict[str, Any]:
    """Trains until `config.train.steps`, from the last checkpoint of `workdir` if it has one.

    On SIGTERM to any process, the run saves a checkpoint and returns early; while there is nothing to save, SIGTERM
    ends the process with `interrupted_exit_code`.

    Returns:
        The content of `summary.json` if the run is complete and this is process 0; otherwise the step reached.

    Raises:
        UserError: if the config does not fit the devices, the data or the run in `workdir`, if `workdir` cannot be
            written (a full disk) or another process trains in it, or (`NonFiniteError`) the loss is no longer finite.
    """
    with started_run(config, workdir, interrupted_exit_code) as run:
        return run.train()


@contextmanager
def started_run(config: Config, workdir: Path, interrupted_exit_code: int = 0) -> Iterator["TrainingRun"]:
    """A run that is ready for its next step, closed at the end; arguments and errors as in `train`."""
    with ExitStack() as held, closing_together(TrainingRun(config, workdir, held, interrupted_exit_code)) as run:
        yield run


class TrainingRun:
    """A run in progress. The constructor starts or resumes it, in the order in which things happen.

    Args:
        config: config of the run.
        workdir: workdir of the run.
        held: receives what the run holds until its end: the workdir's lock, the SIGTERM handler, the mesh in context.
        interrupted_exit_code: as in `train`.
    """

    def __init__(self, config: Config, workdir: Path, held: ExitStack, interrupted_exit_code: int = 0) -> None:
        # 1. The mesh and the model's shapes. A config that cannot work is refused before anything is written.
        mesh = make_mesh(config.mesh)
        check_fit(config, mesh)
        plan = plan_state(config, mesh)
        config = plan.config  # with every option of the router filled in

        # 2. The workdir, which process 0 locks for all, and the data.
        config = open_workdir(workdir, config)
        first_then_others(lambda: process_index() or held.enter_context(exclusive_run(workdir)))
        self._stop = held.enter_context(preemption(interrupted_exit_code))
        data = prepare_data(config.data)
        # The config records only the corpora found now: a missing one may appear before the run is resumed.
        config = with_corpora(config, data.corpora)
        plan = dataclasses.replace(plan, config=config)
        _check_data(config, data)
        held.enter_context(jax.set_mesh(mesh))
        self._clock = Clock(step_cost(config, mesh))
        self._batches = data.train_batches(process_rows(mesh, config.data.batch_size))

        # 3. The state: from the newest checkpoint, or with the weights of init_from, or fresh.
        self._checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        restored = self._checkpoints.restore_latest(plan, data.fingerprint)
        self._skipped = SkippedSteps()
        if restored is None:
            self.state = _initial_state(config, plan, data)
        else:
            self.state, saved = restored
            self._batches.set_state(saved["iterator"])
            self._skipped = SkippedSteps(**saved.get("skipped", {}))
            _log.info("resuming %s from step %d", workdir, int(self.state.step))
        self.step = int(self.state.step)

        # 4. The program. All checks have passed, so the run is recorded.
        self._compiled: CompiledStep | None = None
        if self.step < config.train.steps:
            record_run(workdir, config, data.vocabulary)
            self._compiled = _compile(config, plan, mesh)
            all_values("compiled")  # a process that enters a step alone gives up waiting after a while

        self.config, self.workdir, self._data, self._mesh = config, workdir, data, mesh
        self._writer = MetricsWriter(workdir, self.step)
        self._progress = Progress(self.step, config.train.steps)
        self._watchdog = Watchdog(config.train.step_timeout)
        self._trace = Trace(workdir, config.train)
        self._evaluated = _last_evaluation(workdir)
        self._pending: deque[tuple[int, Metrics]] = deque()  # metrics that the devices may still be computing

    @property
    def complete(self) -> bool:
        """True if all steps are taken and the last is evaluated."""
        return self.step >= self.config.train.steps and self._evaluated == self.step

    def train(self) -> dict[str, Any]:
        """Takes the remaining steps, evaluates and saves on the way, and returns what `train` returns."""
        if self.complete:
            return self._finish()
        every, last = self.config.train.checkpoint_every, self.config.train.steps
        # Real devices get the next step before the host waits for the metrics of the last one.
        in_flight = 0 if jax.default_backend() == "cpu" else 1
        evaluator = Evaluator(self.config, self._data, self._mesh)
        self._clock.lap()
        with self._stop.deferred():
            self._evaluate_if_due(evaluator)  # SIGTERM may have interrupted the last evaluation
            while self.step < last and not self._stop.reached(self.step):
                with self._trace.step(self.step + 1):
                    self.advance()
                    self.settle(in_flight)
                self._trace.stop_after(self.step, self.state)
                self._checkpoints.check()
                self._evaluate_if_due(evaluator)
                if self.step % every == 0 and self.step < last:
                    self._save()
            self._trace.close()
            self._save()
            self._checkpoints.wait()
        return self._finish() if self.complete else {"steps": self.step, "interrupted": True}

    def advance(self) -> None:
        """Takes one step; does not wait for the devices to finish it."""
        assert self._compiled is not None, "the run is complete"
        self._watchdog.mark(f"reading the batch of step {self.step + 1}")
        with self._clock.measure("data_wait"):
            batch = next(self._batches)
        self._watchdog.mark(f"computing step {self.step + 1}", waits_for_others=process_count() > 1)
        with self._clock.measure("step"):
            self.state, metrics = one_at_a_time(self._compiled(self.state, place_batch(batch, self._mesh)))
        self.step += 1
        self._pending.append((self.step, metrics))

    def settle(self, keep: int = 0) -> None:
        """Waits for all steps but the last `keep`, logs them, and stops at or counts those that are not finite."""
        train = self.config.train
        while len(self._pending) > keep:
            step, metrics = self._pending.popleft()
            with self._clock.measure("step"):
                values = jax.device_get(metrics)
            norms, finite = values.pop("gradient_norms"), bool(values.pop("finite"))
            skipped = self._skipped.count(step, finite, values, norms, train)
            if skipped:
                self._progress.say(skipped)
            if train.non_finite == "skip":
                values["skipped_steps"] = self._skipped.total
            self._clock.count_step(int(values["tokens"]))
            shown = None
            if step % train.log_every == 0 or step == train.steps:
                speed = self._clock.lap()
                with self._clock.measure("logging"):
                    self._writer.write("train", step, values | speed | device_memory())
                shown = {"loss": f"{values['loss']:.3f}", "tokens/s": f"{speed['tokens_per_second']:.0f}"}
            self._progress.update(step, shown)

    def _evaluate_if_due(self, evaluator: Evaluator) -> None:
        """Evaluates if `config.evaluate` asks for it at this step; after SIGTERM, the resumed run does it instead."""
        every, last = self.config.evaluate.every, self.config.train.steps
        due = self.step >= last or (every and self.step and self.step % every == 0)
        if not due or self._evaluated == self.step:
            return
        self.settle()
        self._watchdog.mark(None)
        with self._clock.measure("evaluation"):
            try:
                results = evaluator(self.state.model, self._stop.check)
            except Preempted:
                return
            self._writer.write("evaluate", self.step, results)
            self._evaluated = self.step
            self._progress.say(f"step {self.step}: held-out neg_log_perplexity {results['neg_log_perplexity']:.4f}")

    def _save(self) -> None:
        """Starts writing a checkpoint."""
        self.settle()  # first, so that no state that is not finite is saved
        self._watchdog.mark(None)
        with self._clock.measure("checkpoint"):
            data = {
                "iterator": self._batches.get_state(),
                "fingerprint": self._data.fingerprint,
                "skipped": dataclasses.asdict(self._skipped),
            }
            self._checkpoints.save(self.state, data, self.config)

    def _finish(self) -> dict[str, Any]:
        """Writes and returns the summary; a value without a record, for example after few steps, is None."""
        self._checkpoints.wait()
        if process_index():
            return {"steps": self.step}
        train, evaluate = read_metrics(self.workdir, "train"), read_metrics(self.workdir, "evaluate")
        last = evaluate[-1] if evaluate else {}
        summary = {
            "steps": self.step,
            "parameters": count_trained(self.state.model),
            "corpora": list(self._data.corpora),
            "devices": self._mesh.size,
            "loss": train[-1]["loss"] if train else None,
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in train) if train else None,
            "evaluation": {name: value for name, value in last.items() if name not in ("kind", "step")},
        }
        write_summary(self.workdir, summary)
        return summary

    def close(self) -> None:
        """Waits for the checkpoint in progress and closes the files."""
        self._watchdog.close()
        with closing(self._progress), closing(self._writer), closing(self._trace):
            self._checkpoints.close()


def _check_data(config: Config, data: Data) -> None:
    """Raises a `UserError` if the data has more ids or classes than the model, or images of another shape."""
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


def _initial_state(config: Config, plan: StatePlan, data: Data) -> TrainState:
    """A fresh state with the weights of `init_from` and the tables of hash layers."""
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


def _compile(config: Config, plan: StatePlan, mesh: Mesh) -> CompiledStep:
    """The compiled train step; logs the time that compiling took and the memory that a device needs."""
    started = time.perf_counter()
    compiled = lower_train_step(config, plan, mesh).compile()
    _log.info("compiled the train step in %.1f s", time.perf_counter() - started)
    memory = compiled.memory_analysis()
    if memory is not None:
        state, temporary = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
        _log.info("memory of a device: %.1f MB of state and batch, %.1f MB of temporaries", state, temporary)
    return compiled


def _last_evaluation(workdir: Path) -> int:
    """The step of the last recorded evaluation, which process 0 reads and tells the others."""
    records = read_metrics(workdir, "evaluate") if process_index() == 0 else []
    return int(all_values(str(max((record["step"] for record in records), default=0)))[0])
