"""The faults of the study: when a process is struck, by what, and what then damages its workdir."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from switchjax.config import Config, UserError
from switchjax.data.prepare import prepare_data
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, with_leaves
from switchjax.studies.disturbed_run import Process, newest_checkpoint
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.state import plan_state

Moment = Callable[[Process, int, random.Random], None]
"""Returns when a process is to be struck, at or after a step."""
Blow = Callable[[Process], None]
"""Strikes a process."""
Damage = Callable[[Path, int, random.Random], None]
"""Damages a workdir after the numbered try, before the next process starts."""


def at_step(process: Process, step: int, chance: random.Random, most: float = 0.1) -> None:
    """Waits for a step, then up to `most` seconds."""
    process.wait_for_step(step)
    time.sleep(chance.uniform(0, most))


def in_save(process: Process, step: int, chance: random.Random) -> None:
    """Waits until the process writes a checkpoint."""
    process.wait_for_step(step)
    process.wait_for_save()
    time.sleep(chance.uniform(0, 0.03))


def at_start(process: Process, step: int, chance: random.Random) -> None:
    """Waits for some seconds, in which the process starts."""
    time.sleep(chance.uniform(0, 6))


in_evaluation: Moment = partial(at_step, most=0.05)
"""Waits for a step that precedes an evaluation."""


kill: Blow = partial(Process.signal, number=signal.SIGKILL)
terminate: Blow = partial(Process.signal, number=signal.SIGTERM)
fill: Blow = partial(Process.limit_files, size=1)
"""Leaves no room on the disk."""


def fill_for_arrays(process: Process) -> None:
    """Leaves room on the disk for logs, but none for the arrays of a checkpoint."""
    logs = [process.workdir / "metrics.jsonl", *(process.workdir / "tensorboard").iterdir()]
    process.limit_files(max(log.stat().st_size for log in logs) + 2**14)  # more than the logs of 4 steps


def nothing(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Leaves the workdir as it is."""


def truncate(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Truncates one file of arrays, or of their description, at a random length."""
    files = sorted(path for path in (newest_checkpoint(workdir) / "state").rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size > 200]  # not the empty marks of completeness
    path = chance.choice(files)
    os.truncate(path, chance.randrange(path.stat().st_size // 2))


def halve(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Deletes a random half of the files, as an interrupted copy leaves it."""
    files = sorted(path for path in newest_checkpoint(workdir).rglob("*") if path.is_file())
    for path in chance.sample(files, len(files) // 2):
        path.unlink()


def put_foreign(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Adds beside the checkpoints, in turn: one of another run, another program's folder, an empty one, a file."""
    newest = newest_checkpoint(workdir)
    foreign = newest.with_name(str(int(newest.name) + chance.randrange(1, 1000)))
    kind = attempt % 4
    if kind == 0:
        shutil.copytree(newest, foreign)
        path = foreign / "config" / "metadata"
        config = json.loads(path.read_text())
        config["train"]["seed"] += 1
        path.write_text(json.dumps(config))
    elif kind == 3:
        foreign.write_text("not a folder")
    else:
        foreign.mkdir()
        if kind == 1:
            (foreign / "model.bin").write_bytes(chance.randbytes(1000))


@dataclass(frozen=True)
class Fault:
    """A way to disturb a run."""

    name: str
    tries: int
    moment: Moment
    blow: Blow
    exit_code: int
    damage: Damage = nothing
    steps: int = 1
    """Tries strike at multiples of this step."""


FAULTS = (
    Fault("kill -9 at a random step", 12, at_step, kill, -signal.SIGKILL),
    Fault("kill -9 while a checkpoint is written", 6, in_save, kill, -signal.SIGKILL),
    Fault("kill -9 while it starts", 2, at_start, kill, -signal.SIGKILL),
    Fault("SIGTERM at a random step", 4, at_step, terminate, 0),
    Fault("SIGTERM while a checkpoint is written", 2, in_save, terminate, 0),
    Fault("SIGTERM while it starts", 4, at_start, terminate, 0),
    Fault("SIGTERM during an evaluation", 2, in_evaluation, terminate, 0, steps=20),
    Fault("newest checkpoint truncated", 4, at_step, terminate, 0, truncate),
    Fault("newest checkpoint half-written", 4, at_step, terminate, 0, halve),
    Fault("foreign folder or file beside the checkpoints", 4, at_step, terminate, 0, put_foreign),
    Fault("disk full for a checkpoint's arrays", 2, at_step, fill_for_arrays, 2),
    Fault("disk full for everything", 2, at_step, fill, 2),
)


def poison(config: Config, trained: Path, target: Path) -> None:
    """Copies a run and gives a rare token an infinite vector: steps on batches with that token are not finite."""
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
    """The first token that exactly 4 of the run's batches hold."""
    batches = itertools.islice(prepare_data(config.data).train_batches(), config.train.steps)
    found = Counter(
        int(token) for batch in batches for token in np.union1d(batch["encoder_tokens"], batch["decoder_inputs"])
    )
    for token, count in sorted(found.items()):
        if count == 4:
            return token
    raise UserError("the study needs a token that exactly 4 of the run's batches hold, to poison them; there is none")
