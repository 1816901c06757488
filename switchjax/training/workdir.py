"""The files of a run beside its checkpoints and metrics: config, vocabulary, summary, lock."""

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
from switchjax.training.metrics import METRICS, writing

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
"""Prefixes of keys that may change when a run is resumed, because they do not alter what a step computes.

Two exceptions: the last two keys alter steps where the run would otherwise end, and `train.steps` alters learning rates
that fall to 0 at the last step. A longer run is worth more than the same rates, so that change is only a warning.
"""

_OF_A_HOST = ("data.directory", "data.vocabulary")
"""Keys that may differ between the processes of a run; another check compares their data."""

_VOCABULARY = "vocabulary.model"
_SUMMARY = "summary.json"

_ELSEWHERE = "choose another --workdir"


def open_workdir(workdir: Path, config: Config) -> Config:
    """Creates the folder, or checks that the run there has this config.

    Returns:
        `config`; if a run is resumed, without corpora that were unavailable when the run started.

    Raises:
        UserError: naming the first key that differs from the run there or between processes; or if the folder holds
            other files or a complete run without its checkpoints, cannot be made, or some process does not see it.
    """
    check_mounted(workdir)
    config = first_then_others(lambda: _open(workdir, config))
    if process_count() > 1:
        _check_shared(workdir)
        _check_same(config)
    return config


def _open(workdir: Path, config: Config) -> Config:
    checkpoints = workdir / "checkpoints"
    resumes = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    if not resumes and (workdir / _SUMMARY).exists():
        raise UserError(f"{workdir} holds a complete run without its checkpoints; {_ELSEWHERE}")
    # A run that was killed before its first checkpoint starts again, but never replaces the files of anything else.
    if resumes or any((workdir / name).exists() for name in ("config.json", _VOCABULARY, METRICS)):
        try:
            saved = with_all_options(load_workdir_config(workdir))
        except UserError as error:
            raise UserError(f"{workdir} holds no run that can be resumed ({error}); {_ELSEWHERE}") from None
        # A run that failed before its first record, for example out of memory, may start again with another config.
        metrics = workdir / METRICS
        if resumes or (metrics.exists() and metrics.stat().st_size > 0):
            config = _as_begun(workdir, saved, with_all_options(config))
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    return config


def _as_begun(workdir: Path, saved: Config, config: Config) -> Config:
    """`config` with the corpora of the run to resume, whose config is `saved`; refuses any other difference."""
    if common := tuple(name for name in saved.data.corpora if name in config.data.corpora):
        if others := set(config.data.corpora) - set(common):
            _log.warning("%s started without %s and continues without", workdir, ", ".join(sorted(others)))
        # The fingerprint in the checkpoints tells whether these are exactly the run's corpora.
        saved, config = with_corpora(saved, common), with_corpora(config, common)
    check_same_run(saved, config, f"{workdir} holds a run with another config", _ELSEWHERE)
    for key, change in differences(saved, config).items():
        _log.info("resuming with another %s: %s", key, change)
        if key == "train.steps" and config.optimizer.ends_at_zero:
            schedule = f"optimizer.schedule={config.optimizer.schedule} goes down to 0 at the last step"
            _log.warning("%s: learning rates are now those of a run of %d steps", schedule, config.train.steps)
    return config


def with_corpora(config: Config, corpora: tuple[str, ...]) -> Config:
    """`config` with only these of its corpora."""
    return dataclasses.replace(config, data=config.data.only(corpora))


def check_same_run(saved: Config, config: Config, found: str, advice: str) -> None:
    """Raises a `UserError` with `found`, the key and `advice` at the first difference that would change a step."""
    for key, change in differences(saved, config).items():
        if not key.startswith(_FREE):
            raise UserError(f"{found} ({key}: {change}); {advice}")


@contextmanager
def exclusive_run(workdir: Path) -> Iterator[None]:
    """Locks a workdir against other runs on this machine; raises a `UserError` if another process holds the lock."""
    # The kernel releases the lock of a killed process.
    with writing(workdir):
        lock = (workdir / "run.lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains in {workdir} already; wait for it or choose another") from None
        except OSError as error:  # a file system without locks
            _log.warning("%s cannot be locked (%s): make sure that no other run uses it", workdir, error.strerror)
        yield


def _check_shared(workdir: Path) -> None:
    """Refuses a folder that the processes do not share, in which a checkpoint would be in pieces."""
    path = workdir / all_values(f".shared.{uuid.uuid4().hex}")[0]

    def create() -> None:
        if process_index() == 0:
            with writing(workdir):
                path.touch()

    first_then_others(create)
    seen = all_values(str(path.exists()))
    if process_index() == 0:
        path.unlink()
    if blind := [str(index) for index, answer in enumerate(seen) if answer == "False"]:
        raise UserError(
            f"{workdir} must lie on a disk that all processes share: "
            f"process {', '.join(blind)} does not see what process 0 writes there"
        )


def _check_same(config: Config) -> None:
    """Refuses processes with different configs."""
    first, *others = map(Config.from_json, all_values(config.to_json()))
    for index, other in enumerate(others, 1):
        for key, change in differences(first, other).items():
            if key not in _OF_A_HOST:
                raise UserError(f"process {index} has another config than process 0 ({key}: {change})")


def record_run(workdir: Path, config: Config, vocabulary: Vocabulary | None) -> None:
    """Writes `config.json` and `vocabulary.model` in process 0; removes the summary of an earlier, shorter run."""
    if process_index():
        return
    _write_atomically(workdir / "config.json", config.to_json().encode())
    if vocabulary is not None:
        _write_atomically(workdir / _VOCABULARY, vocabulary.model)
    (workdir / _SUMMARY).unlink(missing_ok=True)


def write_summary(workdir: Path, summary: dict[str, Any]) -> None:
    """Writes `summary.json`, which marks the run as complete."""
    _write_atomically(workdir / _SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def vocabulary_path(workdir: Path) -> Path:
    """The path of a run's vocabulary."""
    return workdir / _VOCABULARY


def load_vocabulary(workdir: Path, config: Config) -> Vocabulary:
    """The vocabulary of a run; raises a `UserError` if the workdir has none."""
    return Vocabulary.load(vocabulary_path(workdir), config.data.num_sentinels)


def check_mounted(workdir: Path) -> None:
    """Raises a `UserError` for the address of a bucket."""
    # Otherwise a local folder of that name would be created, and lost with the machine.
    if workdir.parts and workdir.parts[0].endswith(":"):
        raise UserError(f"{workdir} is not a folder: mount the bucket and name the folder there (docs/pods.md)")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None
