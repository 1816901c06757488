"""Trains the same small model on the same text with every router."""

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from switchjax.config import UserError
from switchjax.parallel.mesh import emulate_devices
from switchjax.studies.flags import LoadConfig
from switchjax.studies.report import number, percent, text
from switchjax.studies.train_to_end import train_to_end
from switchjax.training.metrics import read_metrics

_TOP_2 = {"num_selected_experts": 2, "fill_order": "token_by_token"}
_GROUPS = {"options": {"num_expert_groups": 2}}
_CAPACITY_2 = {"train_capacity_factor": 2.0, "eval_capacity_factor": 2.0}
_NO_BALANCE = {"load_balance_loss": 0.0}
_IMPORTANCE, _V_MOE = (_NO_BALANCE | {"importance_loss": weight, "load_loss": weight} for weight in (0.1, 0.005))
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
    "noisy_top_k, K = 2": {"router": "noisy_top_k", "loss_weights": _IMPORTANCE, **_TOP_2},
    "v_moe, K = 2": {"router": "v_moe", "loss_weights": _V_MOE, **_TOP_2},
    "hierarchical, 1 of 2, then 2 of 4": {"router": "hierarchical", **_GROUPS, "loss_weights": _IMPORTANCE, **_TOP_2},
    "sigmoid, K = 2": {"router": "sigmoid", "loss_weights": _NO_BALANCE, **_TOP_2},
    "expert_choice, c = 2": {"router": "expert_choice", **_CAPACITY_2, "allow_noncausal_routing": True},
    "hash, random": {"router": "hash"},
    "hash, balanced": {"router": "hash", "options": {"hash_table": "balanced"}},
    "base": {"router": "base", "loss_weights": _NO_BALANCE},
    "sinkhorn": {"router": "sinkhorn", "loss_weights": _NO_BALANCE},
    "reinforced": {"router": "reinforced"},
}
"""Name -> changes of the section `moe`; `dense` changes the pattern instead."""
_decimals = "{:.3f}".format


@dataclass(frozen=True)
class RouterRow:
    """The results of a run. Figures of routing are None without experts."""

    router: Annotated[str, text("router")]
    first_loss: Annotated[float, number("loss, first steps", _decimals)]
    """Mean of the first tenth of the records; `last_loss` is that of the last tenth."""
    last_loss: Annotated[float, number("loss, last steps", _decimals)]
    held_out_loss: Annotated[float, number("held-out loss", _decimals)]
    dropped_in_training: Annotated[float | None, number("dropped in training", percent, "-")]
    dropped_in_evaluation: Annotated[float | None, number("in evaluation", percent, "-")]
    expert_load_top: Annotated[float | None, number("top share", _decimals, "-")]
    expert_load_bottom: Annotated[float | None, number("bottom share", _decimals, "-")]
    tokens_per_second: Annotated[float, number("tokens/s", "{:,.0f}".format)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/quickstart.py:study", help="config that each router changes")
    parser.add_argument("--workdir", type=Path, default=Path("runs/routers"), help="folder of the runs")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[RouterRow]:
    """Trains one run for each router; only reads complete runs, resumes others."""
    base = load(flags.config)
    emulate_devices(base.mesh)
    for name, changes in STUDIED.items():
        config = dataclasses.replace(
            base,
            moe=dataclasses.replace(base.moe, **changes),
            model=dataclasses.replace(base.model, pattern=("dense",)) if name == "dense" else base.model,
        )
        folder = flags.workdir / name.replace(", ", "_").replace(" ", "_")
        yield make_row(name, folder, train_to_end(config, folder))


def make_row(name: str, workdir: Path, summary: Mapping[str, Any]) -> RouterRow:
    """Makes the row of a complete run; raises a `UserError` if its loss did not fall."""
    records, evaluation = read_metrics(workdir, "train"), summary["evaluation"]
    tenth = max(1, len(records) // 10)

    def mean(metric: str, part: slice = slice(None)) -> float:
        return sum(record[metric] for record in records[part]) / len(records[part])

    first, last = slice(tenth), slice(-tenth, None)
    if not mean("loss", last) < mean("loss", first):
        raise UserError(f"the loss of {name} did not fall: see {workdir / 'metrics.jsonl'}")
    routed = "expert_load" in records[0]
    return RouterRow(
        router=name,
        first_loss=mean("loss", first),
        last_loss=mean("loss", last),
        held_out_loss=-evaluation["neg_log_perplexity"],
        dropped_in_training=mean("fraction_tokens_dropped") if routed else None,
        dropped_in_evaluation=evaluation["fraction_tokens_dropped"] if routed else None,
        expert_load_top=mean("expert_load_top", last) if routed else None,
        expert_load_bottom=mean("expert_load_bottom", last) if routed else None,
        tokens_per_second=summary["tokens_per_second"],
    )
