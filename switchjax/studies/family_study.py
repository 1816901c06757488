"""Trains a tiny model of each family beside its dense twin."""

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from switchjax.accounting.accounting import account
from switchjax.config import Config
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.flags import LoadConfig
from switchjax.studies.report import Row, number, percent, text
from switchjax.studies.train_to_end import train_to_end
from switchjax.training.evaluation import evaluate_workdir

PAIRS = ("glam", "mixtral", "pr-moe", "base", "lstm-moe", "v-moe")
"""Arguments of configs/families.py; `NAME-dense` is the twin of `NAME`."""
CAPACITIES = (1.05, 0.75, 0.5, 0.25)
"""Capacity factors of V-MoE's evaluations."""
_decimals, _percent = "{:.3f}".format, partial(percent, digits=2)


@dataclass(frozen=True)
class FamilyRow:
    """A model with experts beside its dense twin."""

    family: Annotated[str, text("family")]
    parameters: Annotated[int, number("parameters", "{:,}".format)]
    active_parameters: Annotated[int, number("active", "{:,}".format)]
    twin_parameters: Annotated[int, number("of the dense twin", "{:,}".format)]
    loss: Annotated[float, number("held-out loss", _decimals)]
    twin_loss: Annotated[float, number("of the dense twin", _decimals)]
    gain: Annotated[float, number("gain", "{:+.3f}".format)]
    """The twin's loss minus this loss."""
    accuracy: Annotated[float, number("accuracy", percent)]
    twin_accuracy: Annotated[float, number("of the dense twin", percent)]
    fraction_tokens_dropped: Annotated[float, number("dropped in evaluation", percent)]


@dataclass(frozen=True)
class CapacityRow:
    """V-MoE evaluated with fewer slots: the best tokens, or the first, get them."""

    eval_capacity_factor: Annotated[float, number("V-MoE's eval_capacity_factor")]
    batch_prioritized_accuracy: Annotated[float, number("accuracy, batch-prioritised", _percent)]
    first_come_accuracy: Annotated[float, number("accuracy, first come", _percent)]
    fraction_tokens_dropped: Annotated[float, number("dropped", percent)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/families.py", help="config file of the pairs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/families"), help="folder of the runs")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[Row]:
    """Trains both models of each pair, then evaluates V-MoE at each capacity; only reads complete runs."""
    for name in PAIRS:
        yield _train_pair(name, flags, load)
    config = load(f"{flags.config}:v-moe")
    for capacity in CAPACITIES:
        best, first = (
            _evaluate(config, flags.workdir / "v-moe", capacity, order) for order in ("batch_prioritized", "first_come")
        )
        yield CapacityRow(capacity, best["accuracy"], first["accuracy"], best["fraction_tokens_dropped"])


def _train_pair(name: str, flags: Namespace, load: LoadConfig) -> FamilyRow:
    sparse, dense = (load(f"{flags.config}:{run}") for run in (name, f"{name}-dense"))
    ours = train_to_end(sparse, flags.workdir / name)["evaluation"]
    twins = train_to_end(dense, flags.workdir / f"{name}-dense")["evaluation"]
    sizes = account(sparse).total, account(sparse).active, account(dense).total
    loss, twin_loss = -ours["neg_log_perplexity"], -twins["neg_log_perplexity"]
    accuracies, dropped = (ours["accuracy"], twins["accuracy"]), ours["fraction_tokens_dropped"]
    return FamilyRow(name, *sizes, loss, twin_loss, twin_loss - loss, *accuracies, dropped)


def _evaluate(config: Config, workdir: Path, capacity: float, order: Any) -> dict[str, float]:
    """Metrics on the whole validation split; a file keeps them, as they take long."""
    path = workdir / f"capacity-{capacity}-{order}.json"
    if not path.exists():
        moe = dataclasses.replace(config.moe, eval_capacity_factor=capacity, fill_order=order)
        evaluate = dataclasses.replace(config.evaluate, batches=0)
        changed = dataclasses.replace(config, moe=moe, evaluate=evaluate)
        _, results = evaluate_workdir(changed, workdir, make_mesh(config.mesh))
        path.write_text(json.dumps(results))
    return json.loads(path.read_text())
