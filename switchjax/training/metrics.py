"""Writes metrics to `metrics.jsonl` and TensorBoard events, and shows a progress bar."""

import io
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar
from tqdm import tqdm

from switchjax.config import UserError
from switchjax.parallel.processes import process_index

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends records to `metrics.jsonl` and to the TensorBoard events of a workdir, in process 0.

    Both files hold whole records at any moment, even on a full disk. The constructor drops records of steps after
    `resume_step`, because the resumed run writes them again.

    Raises:
        UserError: if the disk is full, the workdir cannot be written, or `metrics.jsonl` holds other lines.
    """

    def __init__(self, workdir: Path, resume_step: int):
        self._path = workdir / METRICS
        self._silent = process_index() > 0
        if self._silent:
            return
        with writing(self._path):
            if self._path.exists():
                lines = self._path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if _step_of(line, self._path) <= resume_step]
                temporary = self._path.with_suffix(".tmp")
                temporary.write_bytes(b"".join(kept))
                os.replace(temporary, self._path)
            self._file = self._path.open("ab", buffering=0)
        self._events = _Events(workdir / "tensorboard", resume_step)

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one record of kind train or evaluate.

        In TensorBoard, a vector over layers becomes one curve per layer; a matrix, the least and most of each row.
        """
        if self._silent:
            return
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        record = {"kind": kind, "step": step} | {name: value.tolist() for name, value in values.items()}
        with writing(self._path):
            _append(self._file, (json.dumps(record) + "\n").encode())
        scalars = {}
        for name, value in values.items():
            if value.ndim == 0:
                scalars[f"{kind}/{name}"] = float(value)
            for layer, row in enumerate(value if value.ndim else ()):
                if row.ndim == 0:
                    scalars[f"{kind}/{name}/layer_{layer}"] = float(row)
                else:
                    scalars[f"{kind}/{name}_max/layer_{layer}"] = float(np.max(row))
                    scalars[f"{kind}/{name}_min/layer_{layer}"] = float(np.min(row))
        self._events.write(step, scalars)

    def close(self) -> None:
        """Closes both files."""
        if self._silent:
            return
        self._file.close()
        self._events.close()


class _Events:
    """TensorBoard events; the calling thread writes each as a whole.

    Records are framed by hand because tensorboardX does not survive a full disk: the thread of its `SummaryWriter`
    dies, training then waits for it for ever, and its `EventsWriter` leaves half a record.
    """

    def __init__(self, folder: Path, resume_step: int):
        self._folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            self._file = (folder / name).open("ab", buffering=0)
        self._add(Event(file_version="brain.Event:2"))
        # TensorBoard then hides events of later steps, which an interrupted run has written.
        self._add(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        summary = Summary(value=[scalar(name, value).value[0] for name, value in scalars.items()])
        self._add(Event(step=step, summary=summary))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self._folder):
            # A TFRecord: the length and the data, each followed by its checksum.
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            parts = (length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data)))
            _append(self._file, b"".join(parts))

    def close(self) -> None:
        self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises an `OSError` as a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; what was written before is intact") from None


def _append(file: io.FileIO, record: bytes) -> None:
    """Writes all of `record` or none of it."""
    before = file.seek(0, io.SEEK_END)
    try:
        written = 0
        while written < len(record):
            written += file.write(record[written:])
    except OSError:
        file.truncate(before)
        raise


def read_metrics(workdir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind, in the order of their steps; ignores half a line that a killed process has left."""
    with (workdir / METRICS).open() as lines:
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record.get("kind") == kind]


def _step_of(line: bytes, path: Path) -> float:
    """The step of a record of `path`; infinite for a line that a killed process or a power cut has left."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {"step": math.inf}
    except ValueError:  # a power cut can leave bytes that are neither JSON nor text
        return math.inf
    try:
        return float(record["step"])
    except (KeyError, TypeError, ValueError):
        start = line[:60].decode(errors="replace").strip()
        raise UserError(f"{path} holds a line that is not a record of a run: {start}") from None


class Progress:
    """A progress bar with loss, tokens per second and remaining time, in process 0."""

    def __init__(self, first: int, last: int):
        # A log file cannot redraw a bar, so it gets a line every 15 seconds.
        interval = 0.1 if sys.stderr.isatty() else 15.0
        others = process_index() > 0
        self._bar = tqdm(
            total=last, initial=first, unit="step", dynamic_ncols=True, mininterval=interval, disable=others
        )

    def update(self, step: int, shown: Mapping[str, str] | None = None) -> None:
        """Moves the bar to `step` and shows values beside it."""
        if shown is not None:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(message)

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        self._bar.close()
