"""Stops a run at a step whose loss or gradient is not finite, or counts the steps that it skips."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchjax.config import TrainConfig, UserError

_SHOWN = ("loss", "total_loss", "learning_rate", "parameter_norm")
"""Metrics that a message shows."""


class NonFiniteError(UserError):
    """The loss or a gradient is infinite or NaN; the message says where."""


@dataclass
class SkippedSteps:
    """Numbers of steps that a run has skipped because they were not finite; checkpoints hold it as JSON."""

    total: int = 0
    in_a_row: int = 0

    def count(
        self, step: int, finite: bool, values: Mapping[str, Any], norms: Mapping[str, Any], config: TrainConfig
    ) -> str | None:
        """Counts a step; returns a message if it is skipped, None if it is finite.

        Args:
            step: number of the step.
            finite: True if its loss and gradient are finite.
            values: metrics of the step.
            norms: parameter name -> norm of its gradient.
            config: says whether steps may be skipped, and how many in a row.

        Raises:
            NonFiniteError: if the step must not be skipped, naming the first parameter with a non-finite gradient.
        """
        if finite:
            self.in_a_row = 0
            return None
        bad = [name for name, norm in norms.items() if not np.isfinite(norm)]
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in _SHOWN)
        where = f"first of {len(bad)} parameters whose gradient is not finite: {bad[0] if bad else 'none'}"
        found = f"step {step}: not finite: {shown}; {where}"
        if config.non_finite == "stop":
            raise NonFiniteError(f"{found}; checkpoints of earlier steps are intact")
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row > config.max_skipped_steps:
            raise NonFiniteError(
                f"{found}; {config.max_skipped_steps} steps in a row were skipped before it; "
                "checkpoints of earlier steps are intact"
            )
        return f"{found}; skipped: {self.total} in this run so far"
