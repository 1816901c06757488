"""Where metrics go: `metrics.jsonl`, TensorBoard events and a progress bar."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from switchjax.parallel.processes import process_index


class MetricsWriter:
    """Appends records to `metrics.jsonl` and to TensorBoard events of a workdir, in process 0.

    Args:
        workdir: of the run.
        resume_step: records of later steps, of a run that was cut off, are dropped: they will be written again.
    """

    def __init__(self, workdir: Path, resume_step: int):
        path = workdir / "metrics.jsonl" if process_index() == 0 else Path(os.devnull)
        if process_index() == 0:
            _keep_until(path, resume_step)
        self._file = path.open("a")
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step + 1, write_to_disk=process_index() == 0
        )

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one record: `kind` is train or evaluate; in TensorBoard, an array shows its rows' least and most."""
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        record = {"kind": kind, "step": step} | {name: value.tolist() for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value.ndim == 0:
                self._events.add_scalar(f"{kind}/{name}", float(value), step)
                continue
            for layer, row in enumerate(value):
                self._events.add_scalar(f"{kind}/{name}_max/layer_{layer}", float(np.max(row)), step)
                self._events.add_scalar(f"{kind}/{name}_min/layer_{layer}", float(np.min(row)), step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._events.close()


def read_metrics(workdir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind, in the order of their steps."""
    with (workdir / "metrics.jsonl").open() as lines:
        records = [json.loads(line) for line in lines]
    return [record for record in records if record["kind"] == kind]


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> int | float:
    """The step of a record; infinite for the half line that a kill has left."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except json.JSONDecodeError:
        return float("inf")


class Progress:
    """A bar with loss, tokens a second and the time left, in process 0."""

    def __init__(self, first: int, last: int):
        # In a log file, where a bar cannot be drawn over, a line now and then.
        interval = 0.1 if sys.stderr.isatty() else 15.0
        others = process_index() > 0
        self._bar = tqdm(
            total=last, initial=first, unit="step", dynamic_ncols=True, mininterval=interval, disable=others
        )

    def update(self, step: int, shown: Mapping[str, str] | None = None) -> None:
        """Moves the bar to `step`; `shown` are values beside it."""
        if shown is not None:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._bar.disable:
            self._bar.write(message)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
