"""Disturbs training processes in every way we know of, and checks that the next process resumes identically.

All tries of a fault happen in one run: each process after the first shows what the one before it left.
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
from switchjax.studies.disturbed_run import Process, last_step, newest_checkpoint, records, unfinished_checkpoint
from switchjax.studies.faults import FAULTS, Fault, at_start, at_step, in_save, kill, poison
from switchjax.studies.flags import LoadConfig, positive
from switchjax.studies.report import number, text
from switchjax.training.metrics import MetricsWriter, read_metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FaultRow:
    """The results of all tries of a fault."""

    fault: Annotated[str, text("fault")]
    tried: Annotated[int, number("tried")]
    ended_well: Annotated[int, number("ended as it should")]
    resumed_identically: Annotated[int, number("resumed identically")]
    mean_steps_lost: Annotated[float, number("steps of work lost, mean", "{:.1f}".format)]
    most_steps_lost: Annotated[int, number("most")]
    most_seconds_to_end: Annotated[float, number("seconds to the end, most", "{:.1f}".format)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/quickstart.py:faults", help="config to train")
    parser.add_argument("--workdir", type=Path, default=Path("runs/faults"), help="folder of the runs")
    parser.add_argument("--tries", type=positive, default=20, metavar="N", help="at most N tries of a fault (20: all)")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[FaultRow]:
    """Tries every fault on processes of `train.py`; an interrupted study resumes."""
    config = load(flags.config)
    emulate_devices(config.mesh)
    require(config.model.family == "encoder_decoder", f"faults need an encoder-decoder, not {config.model.family}")
    training = [sys.executable, str(Path(sys.argv[0]).with_name("train.py")), f"--config={flags.config}"]
    study = FaultStudy(training, config, flags.workdir)
    faults = [dataclasses.replace(fault, tries=min(flags.tries, fault.tries)) for fault in FAULTS]
    for fault in faults:
        study.moments(fault)  # refuses a run with too few checkpoints before training it
    for fault in faults:
        tries = study.try_fault(fault)
        unfinished = sum(entry.in_save for entry in tries)
        note = f" ({unfinished} left one unfinished)" if fault.moment is in_save else ""
        yield make_row(fault.name + note, tries)
    skipped, tries = study.try_non_finite()
    yield make_row(f"kill -9 of a run with {skipped} steps that are not finite and skipped", tries)


@dataclass
class Try:
    """The result of one try of a fault."""

    ended_well: bool
    """The process ended with the right exit code, and an error took one line."""
    seconds: float
    """From the blow to the end of the process."""
    in_save: bool
    """The process left a checkpoint unfinished."""
    identical: bool | None = None
    """The next process logged what the undisturbed run did; None until there is a next process."""
    lost: int = 0
    """Logged steps that the next process repeats."""


@dataclass(frozen=True)
class FaultStudy:
    """The runs of a study."""

    command: Sequence[str]
    """The training command without its workdir."""
    config: Config
    workdir: Path
    """Has one folder for each fault."""

    def _start(self, workdir: Path) -> Process:
        return Process(self.command, workdir, (self.workdir / "compiled").absolute())

    def undisturbed(self) -> list[str]:
        """The records of a run that nothing disturbs; trains it if it is missing."""
        workdir = self.workdir / "undisturbed"
        if not (workdir / "summary.json").exists():
            process = self._start(workdir)
            if process.wait():
                raise UserError(f"the undisturbed run failed: {process.output.splitlines()[-1:]}")
        return records(workdir)

    def try_fault(self, fault: Fault) -> list[Try]:
        """Makes all tries of a fault; reads those that an interrupted study has already made."""
        folder = self.workdir / re.sub(r"\W+", "_", fault.name)
        folder.mkdir(parents=True, exist_ok=True)
        notes, workdir = folder / "tries.json", folder / "run"
        expected = self.undisturbed()
        if fault.moment is at_start and not workdir.exists():
            _copy_cut_off(self.workdir / "undisturbed", workdir)
        tries = [Try(**entry) for entry in json.loads(notes.read_text())] if notes.exists() else []
        while not tries or tries[-1].identical is None:
            attempt = len(tries)
            chance, struck = random.Random(f"{fault.name} {attempt}"), None
            reached, process = last_step(workdir), self._start(workdir)
            try:
                if attempt < fault.tries:
                    fault.moment(process, self.moments(fault)[attempt], chance)
                    fault.blow(process)
                    struck = time.monotonic()
                code = process.wait()
            finally:
                process.stop()
            (folder / f"{attempt}.log").write_text(process.output)
            if tries:
                found = records(workdir)
                # A process that ended before it resumed repeats no step; the next one does.
                tries[-1].lost = 0 if process.resumed_from is None else reached - process.resumed_from
                # Only the last process, which nothing strikes, trains to the end.
                tries[-1].identical = found == (expected[: len(found)] if struck else expected)
            if struck:
                ended_well = code == fault.exit_code and is_one_line(process.output, code)
                tries.append(Try(ended_well, time.monotonic() - struck, unfinished_checkpoint(workdir)))
                # A fresh generator, so that the damage does not depend on what the moment drew.
                fault.damage(workdir, attempt, random.Random(f"{fault.name} {attempt}"))
            notes.write_text(json.dumps([asdict(entry) for entry in tries]))
            _log.info("%s: %d of %d", fault.name, attempt, fault.tries)
        return tries

    def moments(self, fault: Fault) -> list[int]:
        """The steps at which the tries strike, in order, between the second checkpoint and the last but one."""
        every, last = self.config.train.checkpoint_every, self.config.train.steps
        steps = [step for step in range(2 * every + 1, last - every) if step % fault.steps == 0]
        require(
            len(steps) >= fault.tries,
            f"{fault.tries} x {fault.name!r} need as many steps between the second checkpoint and the last but one: "
            f"train.steps={last} with train.checkpoint_every={every} has {len(steps)}",
        )
        return sorted(random.Random(fault.name).sample(steps, fault.tries))

    def try_non_finite(self) -> tuple[int, list[Try]]:
        """Kills a run that skips non-finite steps, twice; returns the number of skipped steps, and the tries."""
        source, folder = self.workdir / "poisoned", self.workdir / "non_finite"
        self.undisturbed()
        if not source.exists():
            poison(self.config, self.workdir / "undisturbed", source)
        skip = {
            "init_from.workdir": source.absolute(),
            "train.non_finite": "skip",
            # Not Adafactor, which scales by the norm of a parameter: that norm is infinite here.
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 0.001,
        }
        command = [*self.command, *(f"--config.{key}={value}" for key, value in skip.items())]
        study = dataclasses.replace(self, command=command, workdir=folder)
        tries = study.try_fault(Fault("kill -9", 2, at_step, kill, -signal.SIGKILL))
        return read_metrics(folder / "undisturbed", "train")[-1]["skipped_steps"], tries


def make_row(name: str, tries: Sequence[Try]) -> FaultRow:
    """Counts the tries of a fault."""
    ended_well = sum(entry.ended_well for entry in tries)
    identical = sum(bool(entry.identical) for entry in tries)
    lost = [entry.lost for entry in tries]
    seconds = max(entry.seconds for entry in tries)
    return FaultRow(name, len(tries), ended_well, identical, statistics.mean(lost), max(lost), seconds)


def is_one_line(output: str, code: int) -> bool:
    """True if the output has no traceback, and one error line if the exit code is 2, otherwise none."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return "Traceback" not in output and len(errors) == (code == 2)


def _copy_cut_off(complete: Path, workdir: Path) -> None:
    """Copies a complete run and cuts the copy off after its last but one checkpoint."""
    shutil.copytree(complete, workdir)
    shutil.rmtree(newest_checkpoint(workdir))
    (workdir / "summary.json").unlink()
    MetricsWriter(workdir, int(newest_checkpoint(workdir).name)).close()
