"""Every router on the same small model and text, and the table that comes of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchjax.config import Config, UserError
from switchjax.studies.complete_run import complete_run
from switchjax.studies.markdown import show_row
from switchjax.training.metrics import read_metrics

_TOP_2 = {"num_selected_experts": 2, "fill_order": "token_by_token"}
_IMPORTANCE = {"load_balance_loss": 0.0, "importance_loss": 0.1, "load_loss": 0.1}

STUDIED: dict[str, dict[str, Any]] = {
    "dense": {},
    "switch": {},
    "switch, sampled": {"sample_experts": True},
    "switch, input dropout 0.1": {"input_dropout": 0.1, "jitter_noise": 0.0},
    "switch, argmax": {"jitter_noise": 0.0},
    "switch, batch-prioritised": {"fill_order": "batch_prioritized", "allow_noncausal_routing": True},
    "switch, random order": {"fill_order": "random"},
    "switch, no token left behind": {"no_token_left_behind": 4, "allow_noncausal_routing": True},
    "switch, shared expert": {"num_shared_experts": 1},
    "top_k, K = 2": {"router": "top_k", **_TOP_2},
    "top_k, K = 2, raw gates": {"router": "top_k", "options": {"normalize_gates": False}, **_TOP_2},
    "gshard": {"router": "gshard", **_TOP_2},
    "st_moe": {"router": "st_moe", "loss_weights": {"router_z_loss": 1e-3}, **_TOP_2},
    "noisy_top_k, K = 2": {
        "router": "noisy_top_k", "loss_weights": _IMPORTANCE, **_TOP_2,
    },
    "v_moe, K = 2": {
        "router": "v_moe", "loss_weights": _IMPORTANCE | {"importance_loss": 0.005, "load_loss": 0.005}, **_TOP_2,
    },
    "hierarchical, 1 of 2, then 2 of 4": {
        "router": "hierarchical", "options": {"num_expert_groups": 2}, "loss_weights": _IMPORTANCE, **_TOP_2,
    },
    "sigmoid, K = 2": {"router": "sigmoid", "loss_weights": {"load_balance_loss": 0.0}, **_TOP_2},
    "expert_choice, c = 2": {
        "router": "expert_choice", "train_capacity_factor": 2.0, "eval_capacity_factor": 2.0,
        "allow_noncausal_routing": True,
    },
    "hash, random": {"router": "hash"},
    "hash, balanced": {"router": "hash", "options": {"hash_table": "balanced"}},
    "base": {"router": "base", "loss_weights": {"load_balance_loss": 0.0}},
    "sinkhorn": {"router": "sinkhorn", "loss_weights": {"load_balance_loss": 0.0}},
    "reinforced": {"router": "reinforced"},
}  # fmt: skip
"""Name in the table -> what it changes in the section `moe`; dense changes the pattern instead."""


def study_routers(base: Config, workdir: Path, report: Callable[[str], None]) -> str:
    """Trains one run a router under `workdir` and returns their table.

    Runs that are complete already are not repeated; one that was cut off resumes.

    Args:
        base: the config that each of them changes.
        workdir: of the study.
        report: is told of each run that is finished, by its row of the table.

    Raises:
        UserError: as `train`, or if a loss did not fall.
    """
    lines = [
        "| router | loss, first steps | loss, last steps | held-out loss | dropped in training | in evaluation "
        "| top share | bottom share | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, changes in STUDIED.items():
        config = dataclasses.replace(
            base,
            moe=dataclasses.replace(base.moe, **changes),
            model=dataclasses.replace(base.model, pattern=("dense",)) if name == "dense" else base.model,
        )
        folder = workdir / name.replace(", ", "_").replace(" ", "_")
        lines.append(_row(name, folder, complete_run(config, folder)))
        report(lines[-1])
    return "\n".join(lines)


def _row(name: str, workdir: Path, summary: Mapping[str, Any]) -> str:
    records = read_metrics(workdir, "train")
    tenth = max(1, len(records) // 10)
    first, last = records[:tenth], records[-tenth:]
    if not _mean(last, "loss") < _mean(first, "loss"):
        raise UserError(f"the loss of {name} did not fall: see {workdir / 'metrics.jsonl'}")
    cells = [name, f"{_mean(first, 'loss'):.3f}", f"{_mean(last, 'loss'):.3f}"]
    cells.append(f"{-summary['evaluation']['neg_log_perplexity']:.3f}")
    if "expert_load" in records[0]:
        cells += [f"{100 * _mean(records, 'fraction_tokens_dropped'):.1f} %"]
        cells += [f"{100 * summary['evaluation']['fraction_tokens_dropped']:.1f} %"]
        cells += [f"{_mean(last, 'expert_load_top'):.3f}", f"{_mean(last, 'expert_load_bottom'):.3f}"]
    else:
        cells += ["-"] * 4
    return show_row([*cells, f"{summary['tokens_per_second']:,.0f}"])


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(record[name] for record in records) / len(records)
