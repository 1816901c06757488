"""A run beside its baseline, as a table."""

import json
from pathlib import Path
from typing import Any

from switchjax.accounting.accounting import account
from switchjax.config import UserError, load_workdir_config
from switchjax.training.metrics import read_metrics


def compare(workdir: Path, baseline: Path) -> str:
    """A Markdown table of two complete runs: sizes, speed, held-out loss and when the first passed the second.

    Raises:
        UserError: if one of them is not complete, or they were not evaluated on the same text.
    """
    run, base = _read(workdir), _read(baseline)
    if run["tokens"] != base["tokens"] or run["corpora"].keys() != base["corpora"].keys():
        raise UserError(f"{workdir} and {baseline} were not evaluated on the same held-out text")
    rows = [
        ("parameters, total", f"{run['total']:,}", f"{base['total']:,}"),
        ("parameters, active for a token", f"{run['active']:,}", f"{base['active']:,}"),
        ("steps", f"{run['steps']:,}", f"{base['steps']:,}"),
        ("tokens/s in training", f"{run['speed']:,.0f}", f"{base['speed']:,.0f}"),
        ("held-out loss, nats a token", f"{run['loss']:.3f}", f"{base['loss']:.3f}"),
        *(
            (f"... {corpus}", f"{run['corpora'][corpus]:.3f}", f"{base['corpora'][corpus]:.3f}")
            for corpus in run["corpora"]
        ),
        (f"step at which it passed {baseline.name}'s final loss", _passed(run["curve"], base["loss"]), "-"),
        ("fraction of tokens dropped in evaluation", _percent(run["dropped"]), _percent(base["dropped"])),
    ]
    lines = [f"| | {workdir.name} | {baseline.name} |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {name} | {left} | {right} |" for name, left, right in rows])


def _read(workdir: Path) -> dict[str, Any]:
    accounting = account(load_workdir_config(workdir))
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        return _facts(summary, read_metrics(workdir, "evaluate")) | {
            "total": accounting.total,
            "active": accounting.active,
        }
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{workdir} holds no complete run: {error}") from None


def _facts(summary: dict[str, Any], curve: list[dict[str, Any]]) -> dict[str, Any]:
    results = summary["evaluation"]
    prefix = "neg_log_perplexity/"
    return {
        "steps": summary["steps"],
        "speed": summary["tokens_per_second"],
        "loss": -results["neg_log_perplexity"],
        "corpora": {name.removeprefix(prefix): -value for name, value in results.items() if name.startswith(prefix)},
        "tokens": results["target_tokens"],
        "dropped": results.get("fraction_tokens_dropped"),
        "curve": [(record["step"], -record["neg_log_perplexity"]) for record in curve],
    }


def _passed(curve: list[tuple[int, float]], loss: float) -> str:
    return next((f"{step:,}" for step, value in curve if value <= loss), "not yet")


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"
