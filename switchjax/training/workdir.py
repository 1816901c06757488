"""What a run keeps beside its checkpoints and metrics: config, vocabulary, summary."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError, differences, load_workdir_config
from switchjax.data.vocabulary import Vocabulary

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
)
"""Keys, or sections, that may change when a run is resumed: what a step computes does not depend on them."""

_VOCABULARY = "vocabulary.model"
_SUMMARY = "summary.json"


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the folder, or checks that what was trained there was trained with this config.

    Raises:
        UserError: naming the first key that differs, or if the folder cannot be made.
    """
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


def record_run(workdir: Path, config: Config, vocabulary: Vocabulary | None) -> None:
    """Writes `config.json` and `vocabulary.model` once nothing speaks against the run any more.

    A summary of a shorter run is removed: it would pass for this one's.
    """
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
