"""Trains a run to its end, whatever was done of it before: the one place where studies train."""

import json
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError
from switchjax.training.run import train


def train_to_end(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains what is missing of a run and returns its `summary.json`; a complete run is only read.

    Raises:
        UserError: as `train`, or if the run was told to stop.
    """
    summary = train(config, workdir)
    if summary.get("interrupted"):
        raise UserError(f"stopped at step {summary['steps']} of {workdir}; the same command resumes")
    return json.loads((workdir / "summary.json").read_text())
