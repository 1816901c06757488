"""The study of families, on a tiny pair and a few steps."""

import json
from pathlib import Path

import pytest

from switchjax.config import Config
from switchjax.studies import family_study
from switchjax.studies.family_study import CapacityRow, FamilyRow
from tests.studies.written import check_written, measure
from tests.tiny import changed


@pytest.mark.slow
def test_a_pair_has_a_row_and_complete_runs_are_not_repeated(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_study, "PAIRS", ("v-moe",))
    monkeypatch.setattr(family_study, "CAPACITIES", (1.0, 0.25))
    # The mesh has all 8 devices of the tests.
    configs = {":v-moe": changed(tiny, moe={"allow_noncausal_routing": True, "min_expert_capacity": 1})}
    configs[":v-moe-dense"] = changed(configs[":v-moe"], model={"pattern": ("dense",)})
    rows = measure(family_study, [f"--workdir={tmp_path}"], configs)
    pair, most, least = rows
    assert pair.parameters > pair.active_parameters > pair.twin_parameters
    assert pair.gain == pytest.approx(pair.twin_loss - pair.loss)
    assert least.fraction_tokens_dropped > most.fraction_tokens_dropped  # fewer slots
    written = (tmp_path / "v-moe" / "metrics.jsonl").read_text()
    assert measure(family_study, [f"--workdir={tmp_path}"], configs) == rows
    assert (tmp_path / "v-moe" / "metrics.jsonl").read_text() == written

    saved = json.loads((tmp_path / "v-moe" / "capacity-0.25-first_come.json").read_text())
    assert 0 < saved["fraction_tokens_dropped"] < 1


def test_rows_become_the_documents_tables() -> None:
    rows = [
        FamilyRow("glam", 262416, 151824, 151056, 3.695, 3.703, 0.008, 0.26, 0.2604, 0.0),
        CapacityRow(0.5, 0.7687, 0.759, 0.501),
    ]
    pairs, capacities = check_written(rows, "docs/families.md")
    assert pairs == ["| glam | 262,416 | 151,824 | 151,056 | 3.695 | 3.703 | +0.008 | 26.0 % | 26.0 % | 0.0 % |"]
    assert capacities == ["| 0.5 | 76.87 % | 75.90 % | 50.1 % |"]
