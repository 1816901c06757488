"""The study of routers, on a tiny model, a few steps and two of its rows."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from switchjax.config import Config, UserError
from switchjax.models.families import build
from switchjax.moe.routers import ROUTERS
from switchjax.studies import router_study
from switchjax.studies.router_study import STUDIED, make_row
from tests.studies.written import check_written, measure


def test_every_router_is_studied_and_its_model_can_be_built(tiny: Config) -> None:
    assert {changes.get("router", "switch") for changes in STUDIED.values()} == set(ROUTERS)
    for changes in STUDIED.values():
        config = dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, **changes))
        jax.eval_shape(lambda config=config: build(config, jax.random.key(0)))


@pytest.mark.slow
def test_each_run_has_a_row_and_complete_runs_are_not_repeated(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_study, "STUDIED", {"dense": {}, "hash, balanced": STUDIED["hash, balanced"]})
    rows = measure(router_study, ["--config=tiny", f"--workdir={tmp_path}"], {"tiny": tiny})
    assert [row.router for row in rows] == ["dense", "hash, balanced"]
    assert rows[0].expert_load_top is None
    assert 0 < rows[1].expert_load_bottom < rows[1].expert_load_top
    written = (tmp_path / "hash_balanced" / "metrics.jsonl").read_text()
    assert measure(router_study, ["--config=tiny", f"--workdir={tmp_path}"], {"tiny": tiny}) == rows
    assert (tmp_path / "hash_balanced" / "metrics.jsonl").read_text() == written


def write_records(workdir: Path, losses: list[float], **more: float | list[float]) -> None:
    records = [{"kind": "train", "step": step, "loss": loss, **more} for step, loss in enumerate(losses, 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_rows_are_means_of_the_first_and_the_last_tenth_and_become_the_documents_table(tmp_path: Path) -> None:
    summary = {"evaluation": {"neg_log_perplexity": -4.5, "fraction_tokens_dropped": 0.007}, "tokens_per_second": 1e4}
    losses = [8.0, 6.0, *[5.5] * 16, 5.0, 4.0]
    write_records(tmp_path, losses)
    dense = make_row("dense", tmp_path, summary)
    assert (dense.first_loss, dense.last_loss, dense.dropped_in_training) == (7.0, 4.5, None)
    routed = {"fraction_tokens_dropped": 0.25, "expert_load_top": 0.75, "expert_load_bottom": 0.25}
    write_records(tmp_path, losses, expert_load=[0.75, 0.25], **routed)
    (lines,) = check_written([dense, make_row("switch", tmp_path, summary)], "docs/routers.md")
    assert lines == [
        "| dense | 7.000 | 4.500 | 4.500 | - | - | - | - | 10,000 |",
        "| switch | 7.000 | 4.500 | 4.500 | 25.0 % | 0.7 % | 0.750 | 0.250 | 10,000 |",
    ]


def test_a_loss_that_does_not_fall_is_an_error(tmp_path: Path) -> None:
    write_records(tmp_path, [1.0, 1.0])
    with pytest.raises(UserError, match=r"the loss of switch did not fall"):
        make_row("switch", tmp_path, {"evaluation": {}})
