"""Tiny models of each family beside their dense twins, and the table that comes of it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from switchjax.accounting.parameters import count_parameters
from switchjax.config import Config
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.complete_run import complete_run
from switchjax.studies.markdown import show_row
from switchjax.training.evaluation import evaluate_workdir

PAIRS = ("glam", "mixtral", "pr-moe", "base", "lstm-moe", "v-moe")
"""Arguments of configs/families.py; the twin of each is named after it, with `-dense`."""
CAPACITIES = (1.05, 0.75, 0.5, 0.25)
"""At which V-MoE is evaluated."""


def study_families(load: Callable[[str], Config], workdir: Path, report: Callable[[str], None]) -> str:
    """Trains both models of each pair under `workdir` and returns their table, and V-MoE's by capacity.

    Runs that are complete already are not repeated; one that was cut off resumes.

    Args:
        load: the config of an argument of configs/families.py.
        workdir: of the study.
        report: is told of each pair that is finished, by its row of the table.

    Raises:
        UserError: as `train`.
    """
    lines = [
        "| family | parameters | active | of the dense twin | held-out loss | of the dense twin | gain | accuracy "
        "| of the dense twin | dropped in evaluation |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in PAIRS:
        sparse, dense = load(name), load(f"{name}-dense")
        results = [complete_run(config, workdir / run) for config, run in ((sparse, name), (dense, f"{name}-dense"))]
        lines.append(_row(name, sparse, dense, *results))
        report(lines[-1])
    return "\n".join([*lines, "", *_by_capacity(load("v-moe"), workdir / "v-moe")])


def _row(name: str, sparse: Config, dense: Config, ours: Mapping[str, Any], twins: Mapping[str, Any]) -> str:
    count, twin_count = count_parameters(sparse), count_parameters(dense)
    here, there = ours["evaluation"], twins["evaluation"]
    loss, twin_loss = -here["neg_log_perplexity"], -there["neg_log_perplexity"]
    cells = [name, f"{count.total:,}", f"{count.active:,}", f"{twin_count.total:,}"]
    cells += [f"{loss:.3f}", f"{twin_loss:.3f}", f"{twin_loss - loss:+.3f}"]
    cells += [f"{100 * here['accuracy']:.1f} %", f"{100 * there['accuracy']:.1f} %"]
    cells += [f"{100 * here['fraction_tokens_dropped']:.1f} %"]
    return show_row(cells)


def _by_capacity(config: Config, workdir: Path) -> list[str]:
    """V-MoE's accuracy with fewer and fewer slots, by who gets them."""
    lines = [
        "| V-MoE's eval_capacity_factor | accuracy, batch-prioritised | accuracy, first come | dropped |",
        "|---:|---:|---:|---:|",
    ]
    for capacity in CAPACITIES:
        results = [_evaluated(config, workdir, capacity, order) for order in ("batch_prioritized", "first_come")]
        accuracies = [f"{100 * result['accuracy']:.2f} %" for result in results]
        lines.append(show_row([capacity, *accuracies, f"{100 * results[0]['fraction_tokens_dropped']:.1f} %"]))
    return lines


def _evaluated(config: Config, workdir: Path, capacity: float, order: str) -> dict[str, float]:
    """Results on the whole validation split; computed once, as they are long to come by."""
    path = workdir / f"capacity-{capacity}-{order}.json"
    if not path.exists():
        moe = dataclasses.replace(config.moe, eval_capacity_factor=capacity, fill_order=order)
        evaluate = dataclasses.replace(config.evaluate, batches=0)
        mesh = make_mesh(config.mesh)
        _, results = evaluate_workdir(dataclasses.replace(config, moe=moe, evaluate=evaluate), workdir, mesh)
        path.write_text(json.dumps(results))
    return json.loads(path.read_text())
