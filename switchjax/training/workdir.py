"""What a run keeps beside its checkpoints and metrics: config, vocabulary, summary."""

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError, differences, load_workdir_config
from switchjax.data.vocabulary import Vocabulary
from switchjax.parallel.processes import exchange, first_then_others, process_count, process_index

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
    "train.step_timeout",
    "train.heartbeat_timeout",
)
"""Keys, or sections, that may change when a run is resumed: what a step computes does not depend on them."""

_OF_A_HOST = ("data.directory", "data.vocabulary")
"""Keys that may differ between the processes of a run; that their data are the same is checked by itself."""

_VOCABULARY = "vocabulary.model"
_SUMMARY = "summary.json"


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the folder, or checks that what was trained there was trained with this config.

    Raises:
        UserError: naming the first key that differs, from that run or between processes; or if the folder cannot be
            made, or not all processes see it.
    """
    first_then_others(lambda: _open(workdir, config))
    if process_count() > 1:
        _check_shared(workdir)
        _check_same(config)


def _open(workdir: Path, config: Config) -> None:
    if _has_checkpoints(workdir):
        for key, change in differences(load_workdir_config(workdir), config).items():
            if not key.startswith(_FREE):
                raise UserError(
                    f"{workdir} holds a run with another config ({key}: {change}); choose another --workdir"
                )
            _log.info("resuming with another %s: %s", key, change)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from None


def _check_shared(workdir: Path) -> None:
    """Refuses a folder of which each process sees another: a checkpoint there would be in pieces."""
    name = exchange(f".shared.{uuid.uuid4().hex}")[0]
    if process_index() == 0:
        (workdir / name).touch()
    exchange("written")
    seen = exchange(str((workdir / name).exists()))
    if process_index() == 0:
        (workdir / name).unlink()
    if blind := [str(index) for index, answer in enumerate(seen) if answer == "False"]:
        raise UserError(
            f"{workdir} must lie on a disk that all processes share: "
            f"process {', '.join(blind)} does not see there what process 0 writes"
        )


def _check_same(config: Config) -> None:
    first, *others = map(Config.from_json, exchange(config.to_json()))
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


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
