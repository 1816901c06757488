"""The study of routers, on a tiny model, a few steps and two of its lines."""

import dataclasses
from pathlib import Path

import jax
import pytest

from switchjax.config import Config, UserError
from switchjax.models.families import build
from switchjax.moe.routers import ROUTERS
from switchjax.studies import router_study
from switchjax.studies.router_study import STUDIED, study_routers


def test_every_router_is_studied_and_its_model_can_be_built(tiny: Config) -> None:
    assert {changes.get("router", "switch") for changes in STUDIED.values()} == set(ROUTERS)
    for changes in STUDIED.values():
        config = dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, **changes))
        jax.eval_shape(lambda config=config: build(config, jax.random.key(0)))


@pytest.mark.slow
def test_the_table_has_a_line_a_run_and_complete_runs_are_not_repeated(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_study, "STUDIED", {"dense": {}, "hash, balanced": STUDIED["hash, balanced"]})
    lines: list[str] = []
    table = study_routers(tiny, tmp_path, lines.append)
    assert table.splitlines()[2:] == lines
    assert [line.split(" | ")[0] for line in lines] == ["| dense", "| hash, balanced"]
    assert [line.count("|") for line in lines] == [table.splitlines()[0].count("|")] * 2
    assert "- | - | - | -" in lines[0]
    written = (tmp_path / "hash_balanced" / "metrics.jsonl").read_text()
    assert study_routers(tiny, tmp_path, lines.append) == table
    assert (tmp_path / "hash_balanced" / "metrics.jsonl").read_text() == written


def test_a_loss_that_does_not_fall_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n' * 2)
    with pytest.raises(UserError, match=r"the loss of switch did not fall"):
        router_study._row("switch", tmp_path, {})
