"""Steps whose loss or gradient is not finite stop the run, or are skipped and counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchjax.config import TrainConfig, UserError


class NonFiniteError(UserError):
    """The loss has become infinite or NaN; the message says where."""


@dataclass
class SkippedSteps:
    """Counts the steps of a run that were not finite and were skipped; checkpoints hold it as JSON."""

    total: int = 0
    in_a_row: int = 0

    def count(
        self, step: int, finite: bool, values: Mapping[str, Any], norms: Mapping[str, Any], config: TrainConfig
    ) -> str | None:
        """The message about a step that is skipped; None if it is finite.

        Args:
            step: its number.
            finite: whether its loss and gradient are.
            values: its metrics.
            norms: the norms of its gradients by the names of parameters.
            config: says whether steps are skipped, and how many in a row.

        Raises:
            NonFiniteError: if it is not to be skipped, naming the first parameter whose gradient is not finite.
        """
        if finite:
            self.in_a_row = 0
            return None
        found = f"step {step}: not finite: {_describe(values, norms)}"
        if config.non_finite == "stop":
            raise NonFiniteError(f"{found}; checkpoints of earlier steps are intact")
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row > config.max_skipped_steps:
            raise NonFiniteError(
                f"{found}; {config.max_skipped_steps} steps in a row were skipped before it; checkpoints of earlier "
                "steps are intact"
            )
        return f"{found}; skipped, as {self.total} of this run"


def _describe(values: Mapping[str, Any], norms: Mapping[str, Any]) -> str:
    bad = [name for name, norm in norms.items() if not np.isfinite(norm)]
    shown = ", ".join(
        f"{name} {values[name]:.4g}" for name in ("loss", "total_loss", "learning_rate", "parameter_norm")
    )
    return f"{shown}; first of {len(bad)} parameters whose gradient is not finite: {bad[0] if bad else 'none'}"
