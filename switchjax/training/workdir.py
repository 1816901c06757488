"""What a run keeps beside its checkpoints and metrics: config, vocabulary, summary."""

import dataclasses
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError, differences, load_workdir_config
from switchjax.data.vocabulary import Vocabulary
from switchjax.models.families import with_all_options
from switchjax.parallel.processes import all_values, first_then_others, process_count, process_index
from switchjax.training.metrics import METRICS

_log = logging.getLogger(__name__)

_FREE = (
    "mesh.",
    "evaluate.",
    "data.directory",
    "data.vocabulary",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.trace_",
    "train.step_timeout",
    "train.heartbeat_timeout",
    "train.non_finite",
    "train.max_skipped_steps",
)
"""Keys, or sections, that may change when a run is resumed: what a step computes does not depend on them, or (the last
two) only where the run would otherwise end. Learning rates that go down to 0 at the last step do depend on
`train.steps`, which may change all the same, with a warning: a run that can be made longer is worth more."""

_OF_A_HOST = ("data.directory", "data.vocabulary")
"""Keys that may differ between the processes of a run; that their data are the same is checked by itself."""

_VOCABULARY = "vocabulary.model"
_SUMMARY = "summary.json"
_LOCK = "run.lock"

_ELSEWHERE = "choose another --workdir"

_REPLACED = ("config.json", _VOCABULARY, METRICS)
"""What a run that starts anew writes over."""


def open_workdir(workdir: Path, config: Config) -> Config:
    """Makes the folder, or checks that what was trained there was trained with this config.

    Returns:
        `config`, of whose corpora a run keeps to those that it was begun with: others could not be had then.

    Raises:
        UserError: naming the first key that differs, from that run or between processes; or if the folder holds files
            of something else or a complete run without its checkpoints, cannot be made, or not all processes see it.
    """
    check_mounted(workdir)
    config = first_then_others(lambda: _open(workdir, config))
    if process_count() > 1:
        _check_shared(workdir)
        _check_same(config)
    return config


def _open(workdir: Path, config: Config) -> Config:
    resumes = _has_checkpoints(workdir)
    if not resumes and (workdir / _SUMMARY).exists():
        raise UserError(f"{workdir} holds a complete run without its checkpoints; {_ELSEWHERE}")
    # A run that was killed before its first checkpoint starts anew, but over nobody else's files.
    if resumes or any((workdir / name).exists() for name in _REPLACED):
        try:
            saved = with_all_options(load_workdir_config(workdir))
        except UserError as error:
            raise UserError(f"{workdir} holds no run that could go on ({error}); {_ELSEWHERE}") from None
        # One that has not come to its first record, as for want of memory, may be tried with another config.
        if resumes or _has_records(workdir):
            config = _as_begun(workdir, saved, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    return config


def _has_records(workdir: Path) -> bool:
    path = workdir / METRICS
    return path.exists() and path.stat().st_size > 0


def _as_begun(workdir: Path, saved: Config, config: Config) -> Config:
    """`config` with the corpora of the run that goes on, whose config is `saved`."""
    if common := tuple(name for name in saved.data.corpora if name in config.data.corpora):
        if others := set(config.data.corpora) - set(common):
            _log.warning("%s was begun without %s, and goes on so", workdir, ", ".join(sorted(others)))
        # That these are the ones, neither more nor fewer, is for the checkpoints to say.
        saved, config = with_corpora(saved, common), with_corpora(config, common)
    check_same_run(saved, config, f"{workdir} holds a run with another config", _ELSEWHERE)
    for key, change in differences(saved, config).items():
        _log.info("resuming with another %s: %s", key, change)
        if key == "train.steps" and config.optimizer.ends_at_zero:
            _log.warning(
                "optimizer.schedule=%s goes down to 0 at the last step: learning rates are from here on those of a "
                "run of %d steps",
                config.optimizer.schedule,
                config.train.steps,
            )
    return config


def with_corpora(config: Config, corpora: tuple[str, ...]) -> Config:
    """`config` with some of its corpora alone."""
    return dataclasses.replace(config, data=config.data.only(corpora))


def check_same_run(saved: Config, config: Config, found: str, advice: str) -> None:
    """Refuses a run whose steps would be others.

    Raises:
        UserError: `found`, the first key that differs, and `advice`.
    """
    for key, change in differences(saved, config).items():
        if not key.startswith(_FREE):
            raise UserError(f"{found} ({key}: {change}); {advice}")


@contextmanager
def exclusive_run(workdir: Path) -> Iterator[None]:
    """Holds a workdir against other runs on this machine; a process that is killed lets go of it.

    Raises:
        UserError: if another process holds it.
    """
    try:
        lock = (workdir / _LOCK).open("a+")
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains in {workdir} already; wait for it or choose another") from None
        except OSError as error:  # a file system without locks
            _log.warning("%s cannot be locked (%s): see to it that no other run uses it", workdir, error.strerror)
        yield


def _check_shared(workdir: Path) -> None:
    """Refuses a folder of which each process sees another: a checkpoint there would be in pieces."""
    name = all_values(f".shared.{uuid.uuid4().hex}")[0]
    problem = ""
    if process_index() == 0:
        try:
            (workdir / name).touch()
        except OSError as error:
            problem = f"cannot write to {workdir}: {error.strerror}"
    if problem := all_values(problem)[0]:
        raise UserError(problem)
    seen = all_values(str((workdir / name).exists()))
    if process_index() == 0:
        (workdir / name).unlink()
    if blind := [str(index) for index, answer in enumerate(seen) if answer == "False"]:
        raise UserError(
            f"{workdir} must lie on a disk that all processes share: "
            f"process {', '.join(blind)} does not see there what process 0 writes"
        )


def _check_same(config: Config) -> None:
    first, *others = map(Config.from_json, all_values(config.to_json()))
    for index, other in enumerate(others, 1):
        for key, change in differences(first, other).items():
            if key not in _OF_A_HOST:
                raise UserError(f"process {index} has another config than process 0 ({key}: {change})")


def record_run(workdir: Path, config: Config, vocabulary: Vocabulary | None) -> None:
    """Writes `config.json` and `vocabulary.model`, in process 0, once nothing speaks against the run any more.

    A summary of a shorter run is removed: it would pass for this one's.
    """
    if process_index():
        return
    _write_atomically(workdir / "config.json", config.to_json().encode())
    if vocabulary is not None:
        _write_atomically(workdir / _VOCABULARY, vocabulary.model)
    (workdir / _SUMMARY).unlink(missing_ok=True)


def write_summary(workdir: Path, summary: dict[str, Any]) -> None:
    """Writes `summary.json`, which says that the run is complete."""
    _write_atomically(workdir / _SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def vocabulary_path(workdir: Path) -> Path:
    """Where a run keeps its vocabulary."""
    return workdir / _VOCABULARY


def load_vocabulary(workdir: Path, config: Config) -> Vocabulary:
    """The vocabulary of a run.

    Raises:
        UserError: if the workdir has none.
    """
    return Vocabulary.load(vocabulary_path(workdir), config.data.num_sentinels)


def _has_checkpoints(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def check_mounted(workdir: Path) -> None:
    """Raises a `UserError` for the address of a bucket: a folder of that name would be made here, and gone with the
    machine."""
    if workdir.parts and workdir.parts[0].endswith(":"):
        raise UserError(f"{workdir} is no folder: mount the bucket and name the folder there (docs/pods.md)")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None
