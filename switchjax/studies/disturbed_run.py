"""A run in a process of its own that a study disturbs, and readers of what the run leaves in its workdir."""

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


class Process:
    """Starts one process of a run.

    Args:
        command: the training command without its workdir.
        workdir: the run's.
        compiled: cache of compiled programs, which all processes of a study share.
    """

    def __init__(self, command: Sequence[str], workdir: Path, compiled: Path):
        self.workdir = workdir
        self._before = self._records_id()
        self._lines: list[str] = []
        cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        # The output goes into a pipe: on a full disk, a file would lose the error message.
        self._process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | cache,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self._lines.extend(lines)

    def _records_id(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else -1

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns once `condition` holds or the process has ended."""
        while self._process.poll() is None and not condition():
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Returns once this process has logged `step` or a later one."""
        # A resumed run replaces its records: a new inode shows that this process logs.
        self._wait_until(lambda: self._records_id() not in (-1, self._before) and last_step(self.workdir) >= step)

    def wait_for_save(self) -> None:
        """Returns while the process writes a checkpoint."""
        self._wait_until(lambda: unfinished_checkpoint(self.workdir))

    def signal(self, number: signal.Signals) -> None:
        """Sends the process a signal."""
        self._process.send_signal(number)

    def limit_files(self, size: int) -> None:
        """Lets no file of the process grow beyond `size` bytes: writing then fails as on a full disk."""
        if self._process.poll() is None:
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait(self) -> int:
        """Waits for the end of the process and returns its exit code."""
        code = self._process.wait()
        self._reader.join()
        return code

    def stop(self) -> None:
        """Kills the process if it still runs."""
        self._process.kill()
        self.wait()

    @property
    def output(self) -> str:
        """Everything that the process has printed; complete after `wait`."""
        return "".join(self._lines)

    @property
    def resumed_from(self) -> int | None:
        """The step of the checkpoint that the process restored, or None if it restored none."""
        found = re.search(r"resuming .* from step (\d+)$", self.output, re.MULTILINE)
        return int(found[1]) if found else None


def last_step(workdir: Path) -> int:
    """The last step that a run has logged, or 0 if it has logged none."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in read_metrics(workdir, "train")), default=0)


def records(workdir: Path) -> list[str]:
    """All records of a run in the order of their steps, without timings, as text (in text, NaN equals NaN)."""
    everything = [record for kind in ("train", "evaluate") for record in read_metrics(workdir, kind)]
    everything.sort(key=lambda record: record["step"])
    return [json.dumps({name: value for name, value in record.items() if not _is_time(name)}) for record in everything]


def _is_time(name: str) -> bool:
    """True if a metric depends on the machine, so that two runs never agree on it."""
    return name.endswith(("_per_second", "_fraction")) or name in ("mfu", "device_peak_bytes")


def unfinished_checkpoint(workdir: Path) -> bool:
    """True if a checkpoint is partly written: a process writes it now, or ended before it was complete."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def newest_checkpoint(workdir: Path) -> Path:
    """The folder of the latest complete checkpoint; its name is the step."""
    folders = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]
    return max(folders, key=lambda folder: int(folder.name))
