"""Compares a complete run with its baseline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from switchjax.accounting.accounting import account
from switchjax.config import UserError, load_workdir_config
from switchjax.studies.report import Figure, figures_table, percent
from switchjax.training.metrics import read_metrics

_PREFIX = "neg_log_perplexity/"
_NEVER = -1


def _show_step(step: int) -> str:
    return "not yet" if step == _NEVER else f"{step:,}"


@dataclass(frozen=True)
class RunFigures:
    """The results of a complete run."""

    parameters: Annotated[int, Figure("parameters, total", "{:,}".format)]
    active_parameters: Annotated[int, Figure("parameters, active for a token", "{:,}".format)]
    steps: Annotated[int, Figure("steps", "{:,}".format)]
    tokens_per_second: Annotated[float, Figure("tokens/s in training", "{:,.0f}".format)]
    loss: Annotated[float, Figure("held-out loss, nats a token", "{:.3f}".format)]
    corpus_losses: Annotated[dict[str, float], Figure("... {key}", "{:.3f}".format)]
    step_of_passing: Annotated[int | None, Figure("step at which it passed {baseline}'s final loss", _show_step, "-")]
    fraction_tokens_dropped: Annotated[float | None, Figure("fraction of tokens dropped in evaluation", percent, "-")]
    target_tokens: int
    """Held-out tokens whose mean the losses are."""
    baseline: str


def compare_runs(workdir: Path, baseline: Path) -> str:
    """A Markdown table of two runs: sizes, speed, held-out loss, and when the first passed the second.

    Raises:
        UserError: if a run is not complete, or the runs were not evaluated on the same text.
    """
    base = _read(baseline, baseline.name)
    run = _read(workdir, baseline.name, base.loss)
    if run.target_tokens != base.target_tokens or run.corpus_losses.keys() != base.corpus_losses.keys():
        raise UserError(f"{workdir} and {baseline} were not evaluated on the same held-out text")
    return figures_table({workdir.name: run, baseline.name: base})


def _read(workdir: Path, baseline: str, passed_loss: float | None = None) -> RunFigures:
    counts = account(load_workdir_config(workdir))
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        results: dict[str, Any] = summary["evaluation"]
        return RunFigures(
            parameters=counts.total,
            active_parameters=counts.active,
            steps=summary["steps"],
            tokens_per_second=summary["tokens_per_second"],
            loss=-results["neg_log_perplexity"],
            corpus_losses={
                name.removeprefix(_PREFIX): -value for name, value in results.items() if name.startswith(_PREFIX)
            },
            step_of_passing=None if passed_loss is None else _first_step_below(workdir, passed_loss),
            fraction_tokens_dropped=results.get("fraction_tokens_dropped"),
            target_tokens=results["target_tokens"],
            baseline=baseline,
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{workdir} holds no complete run: {error}") from None


def _first_step_below(workdir: Path, loss: float) -> int:
    evaluations = read_metrics(workdir, "evaluate")
    return next((record["step"] for record in evaluations if -record["neg_log_perplexity"] <= loss), _NEVER)
