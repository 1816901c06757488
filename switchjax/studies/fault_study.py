"""Disturbs training processes in every way we know of, and sees whether the next process resumes identically.

A fault is tried again and again in one run: each process but the first shows what the one before it left.
"""

import dataclasses
import json
import logging
import random
import re
import shutil
import signal
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from switchjax.config import Config, UserError
from switchjax.config.checks import require
from switchjax.parallel.mesh import emulate_devices
from switchjax.studies.disturbed_run import (
    Process,
    last_step,
    newest_checkpoint,
    records,
    step_of,
    unfinished_checkpoint,
)
from switchjax.studies.faults import FAULTS, Fault, at_start, at_step, in_save, kill, poison
from switchjax.studies.flags import LoadConfig, positive
from switchjax.studies.report import number, text
from switchjax.training.metrics import MetricsWriter, read_metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FaultRow:
    """What became of the tries of a fault."""

    fault: Annotated[str, text("fault")]
    tried: Annotated[int, number("tried")]
    ended_well: Annotated[int, number("ended as it should")]
    resumed_identically: Annotated[int, number("resumed identically")]
    mean_steps_lost: Annotated[float, number("steps of work lost, mean", "{:.1f}".format)]
    most_steps_lost: Annotated[int, number("most")]
    most_seconds_to_end: Annotated[float, number("seconds to the end, most", "{:.1f}".format)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/quickstart.py:faults", help="what is trained")
    parser.add_argument("--workdir", type=Path, default=Path("runs/faults"), help="one run a fault")
    parser.add_argument("--tries", type=positive, default=20, metavar="N", help="no more than N of a fault (20: all)")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[FaultRow]:
    """Tries every fault on processes of `train.py`, beside the script that is called; resumes where it was cut off.

    Raises:
        UserError: if the undisturbed run fails, or its config does not suit the study.
    """
    config = load(flags.config)
    emulate_devices(config.mesh)
    require(config.model.family == "encoder_decoder", f"faults need an encoder-decoder, not {config.model.family}")
    training = [sys.executable, str(Path(sys.argv[0]).with_name("train.py")), f"--config={flags.config}"]
    study = FaultStudy(training, config, flags.workdir)
    faults = [dataclasses.replace(fault, tries=min(flags.tries, fault.tries)) for fault in FAULTS]
    for fault in faults:
        study.moments(fault)  # a run with too few checkpoints is refused before it is trained
    for fault in faults:
        tries = study.try_fault(fault)
        unfinished = sum(entry.in_save for entry in tries)
        note = f" ({unfinished} left one unfinished)" if fault.moment is in_save else ""
        yield make_row(fault.name + note, tries)
    skipped, tries = study.try_non_finite()
    yield make_row(f"kill -9 of a run with {skipped} steps that are not finite and skipped", tries)


@dataclass
class Try:
    """How one try of a fault went."""

    ended_well: bool
    """Whether it ended with the right exit code, and with one line where that means an error."""
    seconds: float
    """From the blow to the end."""
    in_save: bool
    """Whether it left a checkpoint unfinished."""
    identical: bool | None = None
    """Whether the next process logged what the undisturbed run did; None until there is one."""
    lost: int = 0
    """Logged steps that had to be taken again."""


@dataclass(frozen=True)
class FaultStudy:
    """Where the runs of a study are, and how they are started.

    Attributes:
        command: the training, without its workdir.
        config: what it trains.
        workdir: one folder a fault.
    """

    command: Sequence[str]
    config: Config
    workdir: Path

    def start(self, workdir: Path) -> Process:
        """A process of the run in `workdir`."""
        return Process(self.command, workdir, (self.workdir / "compiled").absolute())

    def undisturbed(self) -> list[str]:
        """The records of a run that nothing happens to; trains it if it is missing."""
        workdir = self.workdir / "undisturbed"
        if not (workdir / "summary.json").exists():
            process = self.start(workdir)
            if process.wait():
                raise UserError(f"the undisturbed run failed: {process.output.splitlines()[-1:]}")
        return records(workdir)

    def try_fault(self, fault: Fault) -> list[Try]:
        """Returns all tries of a fault; those that an interrupted study has made are only read."""
        folder = self.workdir / re.sub(r"\W+", "_", fault.name)
        folder.mkdir(parents=True, exist_ok=True)
        notes, workdir = folder / "tries.json", folder / "run"
        expected = self.undisturbed()
        if fault.moment is at_start and not workdir.exists():
            _copy_cut_off(self.workdir / "undisturbed", workdir)
        tries = [Try(**entry) for entry in json.loads(notes.read_text())] if notes.exists() else []
        while not tries or tries[-1].identical is None:
            attempt = len(tries)
            reached, process = last_step(workdir), self.start(workdir)
            try:
                struck = self._strike(fault, attempt, process) if attempt < fault.tries else None
                code = process.wait()
            finally:
                process.stop()
            (folder / f"{attempt}.log").write_text(process.output)
            if tries:
                found = records(workdir)
                # If this process did not resume either, the next one shows what is lost.
                tries[-1].lost = 0 if process.resumed_from is None else reached - process.resumed_from
                # The last process goes on to the end.
                tries[-1].identical = found == (expected[: len(found)] if struck else expected)
            if struck:
                ended_well = code == fault.exit_code and is_one_line(process.output, code)
                tries.append(Try(ended_well, time.monotonic() - struck, unfinished_checkpoint(workdir)))
                fault.damage(workdir, attempt, self._chance(fault, attempt))
            notes.write_text(json.dumps([asdict(entry) for entry in tries]))
            _log.info("%s: %d of %d", fault.name, attempt, fault.tries)
        return tries

    def _strike(self, fault: Fault, attempt: int, process: Process) -> float:
        """Waits for the moment and strikes; returns when that was."""
        chance = self._chance(fault, attempt)
        fault.moment(process, self.moments(fault)[attempt], chance)
        fault.blow(process)
        return time.monotonic()

    def moments(self, fault: Fault) -> list[int]:
        """The steps of the tries, in order: after a few checkpoints, and with one still to come.

        Raises:
            UserError: if the run has too few of them.
        """
        every, last = self.config.train.checkpoint_every, self.config.train.steps
        steps = [step for step in range(2 * every + 1, last - every) if step % fault.steps == 0]
        require(
            len(steps) >= fault.tries,
            f"{fault.tries} x {fault.name!r} need as many steps between the second checkpoint and the last but one: "
            f"train.steps={last} with train.checkpoint_every={every} has {len(steps)}",
        )
        return sorted(random.Random(fault.name).sample(steps, fault.tries))

    def _chance(self, fault: Fault, attempt: int) -> random.Random:
        return random.Random(f"{fault.name} {attempt}")

    def try_non_finite(self) -> tuple[int, list[Try]]:
        """Kills a run that skips non-finite steps twice; returns how many steps it skips, and the tries."""
        source, folder = self.workdir / "poisoned", self.workdir / "non_finite"
        self.undisturbed()
        if not source.exists():
            poison(self.config, self.workdir / "undisturbed", source)
        skip = {
            "init_from.workdir": source.absolute(),
            "train.non_finite": "skip",
            # Adafactor scales by the norm of a parameter, which is infinite here.
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 0.001,
        }
        command = [*self.command, *(f"--config.{key}={value}" for key, value in skip.items())]
        study = dataclasses.replace(self, command=command, workdir=folder)
        tries = study.try_fault(Fault("kill -9", 2, at_step, kill, -signal.SIGKILL))
        return read_metrics(folder / "undisturbed", "train")[-1]["skipped_steps"], tries


def make_row(name: str, tries: Sequence[Try]) -> FaultRow:
    """Counts the tries of a fault."""
    lost = [entry.lost for entry in tries]
    return FaultRow(
        fault=name,
        tried=len(tries),
        ended_well=sum(entry.ended_well for entry in tries),
        resumed_identically=sum(bool(entry.identical) for entry in tries),
        mean_steps_lost=statistics.mean(lost),
        most_steps_lost=max(lost),
        most_seconds_to_end=max(entry.seconds for entry in tries),
    )


def is_one_line(output: str, code: int) -> bool:
    """Tells whether the output has one line of error where the exit code is 2, none otherwise, and no traceback."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return "Traceback" not in output and len(errors) == (code == 2)


def _copy_cut_off(complete: Path, workdir: Path) -> None:
    """Copies a run as if it had been cut off after its last but one checkpoint."""
    shutil.copytree(complete, workdir)
    shutil.rmtree(newest_checkpoint(workdir))
    (workdir / "summary.json").unlink()
    MetricsWriter(workdir, step_of(newest_checkpoint(workdir))).close()
