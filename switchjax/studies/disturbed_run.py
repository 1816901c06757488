"""A run in a process of its own, to be disturbed, and what it has left in its workdir."""

import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from switchjax.training.metrics import read_metrics


def _is_time(name: str) -> bool:
    """Whether a metric is of the machine, so that no two runs have it in common."""
    return name.endswith(("_per_second", "_fraction")) or name in ("mfu", "device_peak_bytes")


class Process:
    """One process of a run.

    Args:
        command: the training, without its workdir.
        workdir: of the run.
        compiled: folder of compiled programs, for all processes of a study.
    """

    def __init__(self, command: Sequence[str], workdir: Path, compiled: Path):
        self.workdir = workdir
        self._before = self._records_id()
        self._lines: list[str] = []
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        # Into a pipe: a full disk would swallow what it says of it.
        self._process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(self._process.stdout)

    def _records_id(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else -1

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns once `condition` holds or the process has ended."""
        while self.running and not condition():
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Returns once this process has taken `step`, or one after it."""
        self.wait_until(lambda: self._records_id() not in (-1, self._before) and last_step(self.workdir) >= step)

    def wait_for_save(self) -> None:
        """Returns while a checkpoint is being written."""
        self.wait_until(lambda: unfinished_checkpoint(self.workdir))

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    def limit_files(self, size: int) -> None:
        """From now on no file of it grows beyond `size` bytes: all that writes fails as on a full disk."""
        if self.running:
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def stop(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self.wait()

    @property
    def output(self) -> str:
        """What it has printed; whole once it has ended."""
        return "".join(self._lines)

    @property
    def resumed_from(self) -> int | None:
        """The step of the checkpoint that it has read; None if it did not come to that."""
        found = re.search(r"resuming .* from step (\d+)$", self.output, re.MULTILINE)
        return int(found[1]) if found else None


def last_step(workdir: Path) -> int:
    """The last step that a run has logged; 0 if there is none."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in read_metrics(workdir, "train")), default=0)


def records(workdir: Path) -> list[str]:
    """All that a run has logged, but for times, as text, in which NaN equals NaN."""
    everything = [record for kind in ("train", "evaluate") for record in read_metrics(workdir, kind)]
    everything.sort(key=lambda record: record["step"])
    return [json.dumps({name: value for name, value in record.items() if not _is_time(name)}) for record in everything]


def unfinished_checkpoint(workdir: Path) -> bool:
    """Whether one is being written, or was when the process ended."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def newest_checkpoint(workdir: Path) -> Path:
    """The folder of the latest complete checkpoint."""
    return max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that the folder of a checkpoint is named after."""
    return int(checkpoint.name)
