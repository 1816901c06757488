"""Studies: many runs under one folder, each trained to its end whatever happens in between."""

import json
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError
from switchjax.training.run import train


def complete_run(config: Config, workdir: Path) -> dict[str, Any]:
    """What `summary.json` says of the run of `config`, which is trained, or trained on, where it is not complete.

    Raises:
        UserError: as `train`, or if the run was told to stop.
    """
    summary = train(config, workdir)
    if summary.get("interrupted"):
        raise UserError(f"stopped at step {summary['steps']} of {workdir}; the same command resumes")
    return json.loads((workdir / "summary.json").read_text())
