"""Rows agree with their plans, each is compiled once, and the real TPU compiler makes one."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest

from switchjax import command
from switchjax.accounting.accounting import account
from switchjax.config import Config, UserError
from switchjax.studies import plan_benchmark
from switchjax.studies.layer_benchmark import LayerCase
from switchjax.studies.plan_benchmark import (
    FITS,
    RATIOS,
    Case,
    CompileRatioRow,
    PlannedLayerRow,
    make_row,
    planned,
    slot_bytes,
)
from tests.planning.test_plan import PLAN
from tests.studies.written import ROOT, check_written
from tests.tiny import changed

CASE = Case("switch.py:base-8", ("model.remat=full",), "v5e")


def test_a_row_says_what_a_plan_does_and_becomes_the_documents_table(tiny: Config) -> None:
    row = make_row(CASE, tiny, PLAN)
    assert (row.topology, row.chips, row.all_gathers) == ("v5e:2x4", 8, 0)
    # 48 in the two MoE layers of the tiny model.
    assert (row.all_to_alls, row.all_to_alls_per_layer) == (48, 24)
    assert row.bytes_over_slots == (1 << 30) / (24 * slot_bytes(tiny, PLAN.mesh))
    # Three forward passes at the largest bound of the roofline, 2.5 s.
    flops = 3 * account(tiny).forward_flops * tiny.data.batch_size
    assert row.mfu == pytest.approx(flops / (8 * 197e12 * 2.5))
    ratio = CompileRatioRow("more layers", "v5e:1x1", 1.0, "v5e:2x4", 8.0, 8.0, 1.3)
    layer = PlannedLayerRow(LayerCase(8, 2048, 1), "gather", 1.013, 0.12)
    (fit,), (compared,), (alone,) = check_written([row, ratio, layer], "README.md")
    assert fit.startswith("| `switch.py:base-8` `model.remat=full` | ")
    assert " | v5e:2x4 | 8 | 2/4/1 | 14.0 of 16.0 | 48 | 24 | " in fit
    assert fit.endswith(" | 0 | 5 ms | 1.2 ms | 2.50 s | 0 % | 12 s |")
    assert compared == "| more layers | v5e:1x1 | 1 s | v5e:2x4 | 8 s | 8.00 | 1.3 |"
    assert alone == "| 8, 2048, 1 | gather | 1.01 | 0.1 |"


def test_all_to_alls_a_layer_are_those_of_a_micro_batch(tiny: Config) -> None:
    assert make_row(CASE, changed(tiny, train={"accumulation_steps": 3}), PLAN).all_to_alls_per_layer == 8


def test_slots_of_a_token_cross_once(tiny: Config) -> None:
    mesh = {"data": 2, "expert": 4, "model": 3}
    config = changed(
        tiny,
        model={"d_model": 16, "dtype": "bfloat16"},
        moe={"num_selected_experts": 2, "router": "top_k", "train_capacity_factor": 1.5},
    )
    tokens = config.data.batch_size * (96 + 32) / 8  # of both stacks, which have a MoE layer each, on a device
    assert slot_bytes(config, mesh) == 2 * 1.5 * tokens * 16 * 2
    dropless = changed(config, moe={"dropless": True})
    assert slot_bytes(dropless, mesh) == config.moe.num_experts * tokens * 16 * 2


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_every_case_is_a_config_that_can_be_loaded() -> None:
    for case in [*FITS, *(case for _, _, *cases in RATIOS for case in cases)]:
        command.load_config(str(ROOT / "configs" / case.config), case.arguments)


def test_a_workdir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("")
    flags = Namespace(configs=Path("configs"), workdir=tmp_path / "plan")
    with pytest.raises(UserError, match="--workdir: cannot make"):
        next(plan_benchmark.measure(flags, command.load_config))


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_a_row_is_made_once_for_a_case_and_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("switch.py:runlocal", topology="v5q")  # no such chip: whatever would be compiled is refused
    flags = Namespace(configs=ROOT / "configs", workdir=tmp_path)
    with pytest.raises(UserError, match="no chip 'v5q'"):
        planned(case, flags, command.load_config)
    assert not list(tmp_path.iterdir())
    row = make_row(case, command.load_config(str(ROOT / "configs" / case.config)), PLAN)
    saved = {"case": {**dataclasses.asdict(case), "versions": plan_benchmark.compiler_versions()}}
    path = tmp_path / "switch_runlocal-v5q-2.json"
    path.write_text(json.dumps({**saved, "row": dataclasses.asdict(row)}))
    assert planned(case, flags, command.load_config, 2) == row
    for other in (dataclasses.replace(case, overrides=("model.remat=full",)), case):
        with pytest.raises(UserError, match="no chip 'v5q'"):
            planned(other, flags, command.load_config, 2)
        monkeypatch.setattr(plan_benchmark, "version", lambda name: "later")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_tpu_compiler_makes_a_row_that_stays(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    case, flags = Case("switch.py:runlocal", topology="v5e:2x4"), Namespace(configs=ROOT / "configs", workdir=tmp_path)
    row = planned(case, flags, command.load_config)
    assert (row.topology, row.chips, row.mesh) == ("v5e:2x4", 8, {"data": 2, "expert": 4, "model": 1})
    assert (row.all_to_alls_per_layer, row.all_gathers) == (4, 0)
    assert 0 < row.memory_bytes["total"] < row.memory_bytes["capacity"]
    assert planned(case, flags, command.load_config) == row  # read: compiling takes another time
