"""What a run survives: processes that train are disturbed in every way we know of, and the table that comes of it.

A fault is tried again and again in one run: each process but the first shows what the one before has left.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from switchjax.config import Config, UserError
from switchjax.config.checks import require
from switchjax.data.prepare import prepare_data
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, with_leaves
from switchjax.studies.disturbed_run import (
    Process,
    last_step,
    newest_checkpoint,
    records,
    step_of,
    unfinished_checkpoint,
)
from switchjax.studies.markdown import show_row
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.metrics import MetricsWriter, read_metrics
from switchjax.training.state import plan_state

# The moments at which a process is struck. Each waits for it, and gets the step of this try and a source of chance.
Moment = Callable[[Process, int, random.Random], None]


def _at_step(process: Process, step: int, chance: random.Random) -> None:
    process.wait_for_step(step)
    time.sleep(chance.uniform(0, 0.1))


def _in_save(process: Process, step: int, chance: random.Random) -> None:
    process.wait_for_step(step)
    process.wait_for_save()
    time.sleep(chance.uniform(0, 0.03))


def _at_start(process: Process, step: int, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, 6))


def _in_evaluation(process: Process, step: int, chance: random.Random) -> None:
    process.wait_for_step(step)
    time.sleep(chance.uniform(0, 0.05))


# What strikes it.
Blow = Callable[[Process], None]


def _kill(process: Process) -> None:
    process.signal(signal.SIGKILL)


def _terminate(process: Process) -> None:
    process.signal(signal.SIGTERM)


def _fill_for_arrays(process: Process) -> None:
    logs = [process.workdir / "metrics.jsonl", *(process.workdir / "tensorboard").iterdir()]
    process.limit_files(max(log.stat().st_size for log in logs) + 2**14)  # which the logs of 4 steps do not fill


def _fill(process: Process) -> None:
    process.limit_files(1)


# What befalls the workdir afterwards, before the next process.
Damage = Callable[[Path, int, random.Random], None]


def _nothing(workdir: Path, attempt: int, chance: random.Random) -> None:
    pass


def _truncate(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Cuts one file of arrays, or what describes them, at a random length."""
    files = sorted(path for path in (newest_checkpoint(workdir) / "state").rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size > 200]  # not the empty marks of completeness
    path = chance.choice(files)
    os.truncate(path, chance.randrange(path.stat().st_size // 2))


def _halve(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Leaves a random half of the files, as a copy that was cut off."""
    files = sorted(path for path in newest_checkpoint(workdir).rglob("*") if path.is_file())
    for path in chance.sample(files, len(files) // 2):
        path.unlink()


def _put_foreign(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Puts beside its checkpoints, in turn: one of another run, another program's folder, an empty one, a file."""
    newest = newest_checkpoint(workdir)
    foreign = newest.with_name(str(step_of(newest) + chance.randrange(1, 1000)))
    if attempt % 4 == 0:
        shutil.copytree(newest, foreign)
        path = foreign / "config" / "metadata"
        config = json.loads(path.read_text())
        config["train"]["seed"] += 1
        path.write_text(json.dumps(config))
    elif attempt % 4 == 1:
        foreign.mkdir()
        (foreign / "model.bin").write_bytes(chance.randbytes(1000))
    elif attempt % 4 == 2:
        foreign.mkdir()
    else:
        foreign.write_text("not a folder")


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    name: str
    tries: int
    moment: Moment
    blow: Blow
    exit_code: int
    damage: Damage = _nothing
    steps: int = 1
    """The tries strike at multiples of this step."""


FAULTS = (
    Fault("kill -9 at a random step", 12, _at_step, _kill, -signal.SIGKILL),
    Fault("kill -9 while a checkpoint is written", 6, _in_save, _kill, -signal.SIGKILL),
    Fault("kill -9 while it starts", 2, _at_start, _kill, -signal.SIGKILL),
    Fault("SIGTERM at a random step", 4, _at_step, _terminate, 0),
    Fault("SIGTERM while a checkpoint is written", 2, _in_save, _terminate, 0),
    Fault("SIGTERM while it starts", 4, _at_start, _terminate, 0),
    Fault("SIGTERM during an evaluation", 2, _in_evaluation, _terminate, 0, steps=20),
    Fault("newest checkpoint truncated", 4, _at_step, _terminate, 0, _truncate),
    Fault("newest checkpoint half-written", 4, _at_step, _terminate, 0, _halve),
    Fault("foreign folder or file beside the checkpoints", 4, _at_step, _terminate, 0, _put_foreign),
    Fault("disk full for a checkpoint's arrays", 2, _at_step, _fill_for_arrays, 2),
    Fault("disk full for everything", 2, _at_step, _fill, 2),
)


@dataclass
class Try:
    """How one try of a fault went."""

    ended_well: bool
    """With the exit code that it should have, and in one line if that says error."""
    seconds: float
    """From the blow to the end."""
    in_save: bool
    """It has left a checkpoint unfinished."""
    identical: bool | None = None
    """What the next process logged is what the undisturbed run did; None until there was one."""
    lost: int = 0
    """Steps that were logged and had to be taken again."""


@dataclass(frozen=True)
class FaultStudy:
    """Where the runs of a study are, and how they are started.

    Attributes:
        command: the training, without its workdir.
        config: what it trains.
        workdir: one folder a fault.
        report: is told of each try.
    """

    command: Sequence[str]
    config: Config
    workdir: Path
    report: Callable[[str], None]

    def start(self, workdir: Path) -> Process:
        """A process of the run in `workdir`."""
        return Process(self.command, workdir, (self.workdir / "compiled").absolute())

    def undisturbed(self) -> list[str]:
        """The records of a run that nothing happens to; trained where it is not there."""
        workdir = self.workdir / "undisturbed"
        if not (workdir / "summary.json").exists():
            process = self.start(workdir)
            if process.wait():
                raise UserError(f"the undisturbed run failed: {process.output.splitlines()[-1:]}")
        return records(workdir)

    def try_fault(self, fault: Fault) -> list[Try]:
        """All tries of a fault; those of a study that was cut off are not repeated."""
        folder = self.workdir / re.sub(r"\W+", "_", fault.name)
        folder.mkdir(parents=True, exist_ok=True)
        notes, workdir = folder / "tries.json", folder / "run"
        expected = self.undisturbed()
        if fault.moment is _at_start and not workdir.exists():
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
                # Where it did not come to that either, the loss is the next one's to show.
                tries[-1].lost = 0 if process.resumed_from is None else reached - process.resumed_from
                # The last process goes on to the end.
                tries[-1].identical = found == (expected[: len(found)] if struck else expected)
            if struck:
                ended_well = code == fault.exit_code and _is_one_line(process.output, code)
                tries.append(Try(ended_well, time.monotonic() - struck, unfinished_checkpoint(workdir)))
                fault.damage(workdir, attempt, self._chance(fault, attempt))
            notes.write_text(json.dumps([asdict(entry) for entry in tries]))
            self.report(f"{fault.name}: {attempt} of {fault.tries}")
        return tries

    def _strike(self, fault: Fault, attempt: int, process: Process) -> float:
        """Waits for the moment; when it was."""
        chance = self._chance(fault, attempt)
        fault.moment(process, self.moments(fault)[attempt], chance)
        fault.blow(process)
        return time.monotonic()

    def moments(self, fault: Fault) -> list[int]:
        """The steps of the tries, in order; after a few checkpoints, and with one still to come.

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
        """A run with steps that are not finite and skipped, killed twice: how many those are, and the tries."""
        source, folder = self.workdir / "poisoned", self.workdir / "non_finite"
        self.undisturbed()
        if not source.exists():
            _poison(self.config, self.workdir / "undisturbed", source)
        skip = {
            "init_from.workdir": source.absolute(),
            "train.non_finite": "skip",
            # Adafactor scales by the norm of a parameter, and this one's is infinite.
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 0.001,
        }
        command = [*self.command, *(f"--config.{key}={value}" for key, value in skip.items())]
        study = dataclasses.replace(self, command=command, workdir=folder)
        tries = study.try_fault(Fault("kill -9", 2, _at_step, _kill, -signal.SIGKILL))
        return read_metrics(folder / "undisturbed", "train")[-1]["skipped_steps"], tries


def study_faults(
    command: Sequence[str], config: Config, workdir: Path, most: int, report: Callable[[str], None]
) -> str:
    """Tries every fault under `workdir` and returns their table; resumes where it was cut off.

    Args:
        command: trains `config`, given a `--workdir`.
        config: a small model, with many checkpoints.
        workdir: of the study.
        most: largest number of tries of a fault.
        report: is told of each try, and of each fault that is done by its row of the table.

    Raises:
        UserError: if the run fails that nothing happens to, or `config` is none to study faults with.
    """
    require(config.model.family == "encoder_decoder", f"faults need an encoder-decoder, not {config.model.family}")
    study = FaultStudy(command, config, workdir, report)
    faults = [dataclasses.replace(fault, tries=min(most, fault.tries)) for fault in FAULTS]
    for fault in faults:
        study.moments(fault)  # a run with too few checkpoints is refused before it is trained
    lines = [
        "| fault | tried | ended as it should | resumed identically | steps of work lost, mean | most "
        "| seconds to the end, most |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for fault in faults:
        tries = study.try_fault(fault)
        unfinished = sum(entry.in_save for entry in tries)
        note = f" ({unfinished} left one unfinished)" if fault.moment is _in_save else ""
        lines.append(_row(fault.name + note, tries))
        report(lines[-1])
    skipped, tries = study.try_non_finite()
    lines.append(_row(f"kill -9 of a run with {skipped} steps that are not finite and skipped", tries))
    report(lines[-1])
    return "\n".join(lines)


def _row(name: str, tries: Sequence[Try]) -> str:
    lost = [entry.lost for entry in tries]
    cells = [name, len(tries), sum(entry.ended_well for entry in tries), sum(bool(entry.identical) for entry in tries)]
    cells += [f"{statistics.mean(lost):.1f}", max(lost), f"{max(entry.seconds for entry in tries):.1f}"]
    return show_row(cells)


def _is_one_line(output: str, code: int) -> bool:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return "Traceback" not in output and len(errors) == (code == 2)


def _copy_cut_off(complete: Path, workdir: Path) -> None:
    """A run that is to be resumed from the last but one checkpoint of another."""
    shutil.copytree(complete, workdir)
    shutil.rmtree(newest_checkpoint(workdir))
    (workdir / "summary.json").unlink()
    MetricsWriter(workdir, step_of(newest_checkpoint(workdir))).close()


def _poison(config: Config, trained: Path, target: Path) -> None:
    """A run whose model has an infinite vector for a rare token: batches that hold it are not finite, others are."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        with closing(Checkpoints(trained)) as checkpoints:
            step = checkpoints.steps()[-1]
            state = checkpoints.restore_state(step, plan_state(config, mesh))
            data = checkpoints.restore_data(step)
        parameters = named_leaves(state.model)
        vectors = parameters["embedding/vectors"]
        parameters["embedding/vectors"] = vectors.at[_rare_token(config)].set(jnp.inf)
        poisoned = dataclasses.replace(state, model=with_leaves(state.model, parameters))
        with closing(Checkpoints(target, keep=1)) as checkpoints:
            checkpoints.save(poisoned, data, config)
    for name in ("config.json", "vocabulary.model"):
        shutil.copy(trained / name, target / name)


def _rare_token(config: Config) -> int:
    """One that a few of the run's batches hold."""
    batches = itertools.islice(prepare_data(config.data).train_batches(), config.train.steps)
    found = Counter(
        int(token) for batch in batches for token in np.union1d(batch["encoder_tokens"], batch["decoder_inputs"])
    )
    rare = next((token for token, count in sorted(found.items()) if count == 4), None)
    if rare is None:
        raise UserError("no token is in 4 of the run's batches, as the one that poisons it has to be")
    return rare
