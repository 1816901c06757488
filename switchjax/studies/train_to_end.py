"""Trains a run to its end, from wherever it stands: studies train only through this function."""

import json
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError
from switchjax.training.run import train


def train_to_end(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains the missing steps of a run and returns its `summary.json`; only reads a complete run.

    Raises:
        UserError: as `train`, or if a signal stops the run.
    """
    summary = train(config, workdir)
    if summary.get("interrupted"):
        raise UserError(f"stopped at step {summary['steps']} of {workdir}; the same command resumes")
    return json.loads((workdir / "summary.json").read_text())
