"""The study of families, on a tiny pair and a few steps."""

import json
from pathlib import Path

import pytest

from switchjax.config import Config
from switchjax.studies import family_study
from switchjax.studies.family_study import study_families
from tests.tiny import changed


@pytest.mark.slow
def test_a_pair_has_a_line_and_complete_runs_are_not_repeated(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_study, "PAIRS", ("v-moe",))
    monkeypatch.setattr(family_study, "CAPACITIES", (1.0, 0.25))
    # The tests' 8 devices are all of the mesh.
    configs = {"v-moe": changed(tiny, moe={"allow_noncausal_routing": True, "min_expert_capacity": 1})}
    configs["v-moe-dense"] = changed(configs["v-moe"], model={"pattern": ("dense",)})
    lines: list[str] = []
    table = study_families(configs.__getitem__, tmp_path, lines.append)
    assert table.splitlines()[2:3] == lines
    assert lines[0].count("|") == table.splitlines()[0].count("|")
    written = (tmp_path / "v-moe" / "metrics.jsonl").read_text()
    assert study_families(configs.__getitem__, tmp_path, lines.append) == table
    assert (tmp_path / "v-moe" / "metrics.jsonl").read_text() == written

    rows = [line for line in table.splitlines() if line.startswith(("| 1.0", "| 0.25"))]
    assert len(rows) == 2
    dropped = [float(row.split("|")[-2].strip(" %")) for row in rows]
    assert dropped[1] > dropped[0]  # fewer slots
    saved = json.loads((tmp_path / "v-moe" / "capacity-0.25-first_come.json").read_text())
    assert 0 < saved["fraction_tokens_dropped"] < 1
