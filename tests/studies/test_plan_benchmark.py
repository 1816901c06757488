"""The tables of plans, with a compiler that answers at once."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from switchjax import command
from switchjax.accounting.hardware import Chip, Slice
from switchjax.config import Config, UserError
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.plan import StepPlan
from switchjax.studies import plan_benchmark
from switchjax.studies.plan_benchmark import FITS, RATIOS, Case, slot_bytes, tabulate_plans, utilization
from tests.planning.test_plan import EIGHT, PLAN
from tests.tiny import changed

FIT = Case("switch.py:base-8", ("model.remat=full",), "v5e")
RATIO = ("more layers", 1.3, Case("switch.py:base-8", (), "v5e:1x1"), Case("switch.py:base-8", (), "v5e:2x4"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Slices that were compiled for, as they are; a slice takes as many seconds as it has chips."""
    slices: list[str] = []

    def plan_step(config: Config, slice_: Slice) -> StepPlan:
        slices.append(slice_.name)
        return dataclasses.replace(PLAN, topology=slice_.name, compile_seconds=float(slice_.chips))

    def smallest_fit(config: Config, chip: Chip, report: object) -> StepPlan:
        return plan_step(config, EIGHT)

    monkeypatch.setattr(plan_benchmark, "plan_step", plan_step)
    monkeypatch.setattr(plan_benchmark, "smallest_fit", smallest_fit)
    monkeypatch.setattr(plan_benchmark, "FITS", (FIT,))
    monkeypatch.setattr(plan_benchmark, "RATIOS", (RATIO,))
    monkeypatch.setattr(plan_benchmark, "describe_devices", lambda slice_: [slice_])
    monkeypatch.setattr(plan_benchmark, "plan_layer", lambda case, *_: (case.num_experts / 4, case.num_selected / 4))
    return slices


def test_a_row_says_what_a_plan_does_and_finished_plans_stay(
    tiny: Config, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def load(name: str, overrides: Sequence[str]) -> Config:
        asked.append((name, *overrides))
        return tiny

    lines: list[str] = []
    table, _, layers = tabulate_plans(load, tmp_path / "plans", lines.append).partition("\n\n| one MoE layer")
    table = table.splitlines()
    assert asked[0] == ("switch.py:base-8", "--config.model.remat=full")
    assert compiled == ["v5e:2x4", *["v5e:1x1", "v5e:2x4"] * 3]
    fit, ratio = table[2], table[-1]
    assert fit in lines
    assert ratio in lines
    assert fit.count("|") == table[0].count("|")
    assert ratio.count("|") == table[-2].count("|") == table[-3].count("|")
    cells = [cell.strip() for cell in fit.split("|")]
    assert cells[1] == "`switch.py:base-8` `model.remat=full`"
    assert cells[3:6] == ["v5e:2x4", "8", "2/4/1"]
    # 48 in the two MoE layers of the tiny model.
    ratio_of_bytes = PLAN.collectives["all-to-all"].bytes / (24 * slot_bytes(tiny, PLAN.to_dict()))
    assert cells[6:11] == ["14.0 of 16.0", "48", "24", f"{ratio_of_bytes:.2f}", "0"]
    assert ratio == "| more layers | v5e:1x1 | 1 s | v5e:2x4 | 8 s | 8.00 | 1.3 |"

    assert layers.splitlines()[2:4] == ["| 8, 2048, 1 | gather | 2.00 | 0.2 |", "| 8, 2048, 1 | einsum | 2.00 | 0.2 |"]
    assert tabulate_plans(load, tmp_path / "plans", lines.append).splitlines()[: len(table)] == table
    assert len(compiled) == 7
    monkeypatch.setattr(plan_benchmark, "FITS", (dataclasses.replace(FIT, overrides=("model.remat=dots",)),))
    tabulate_plans(load, tmp_path / "plans", lines.append)
    assert len(compiled) == 8


def test_all_ratios_are_of_the_same_rounds(
    tiny: Config, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, small, middle = RATIO
    large = dataclasses.replace(middle, topology="v5e:4x4")
    monkeypatch.setattr(plan_benchmark, "RATIOS", (RATIO, ("more chips", 1.5, middle, large)))
    table = tabulate_plans(lambda *_: tiny, tmp_path, lambda _: None)
    assert compiled == ["v5e:2x4", *[case.topology for case in (small, middle, large)] * 3]
    assert "| more chips | v5e:2x4 | 8 s | v5e:4x4 | 16 s | 2.00 | 1.5 |" in table


def test_a_plan_of_another_compiler_is_made_anew(
    tiny: Config, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tabulate_plans(lambda *_: tiny, tmp_path, lambda _: None)
    once = list(compiled)
    monkeypatch.setattr(plan_benchmark, "version", lambda name: "later")
    tabulate_plans(lambda *_: tiny, tmp_path, lambda _: None)
    assert compiled == once * 2


def test_a_workdir_that_is_a_file_is_refused(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("")
    with pytest.raises(UserError, match="--workdir: cannot make"):
        tabulate_plans(lambda *_: tiny, tmp_path / "plan", lambda _: None)


def test_all_to_alls_a_layer_are_those_of_a_micro_batch(tiny: Config, tmp_path: Path, compiled: list[str]) -> None:
    config = changed(tiny, train={"accumulation_steps": 3})
    table = tabulate_plans(lambda *_: config, tmp_path, lambda _: None)
    assert "| 48 | 8 |" in table


def test_slots_of_a_token_cross_once(tiny: Config) -> None:
    plan = {"mesh": {"data": 2, "expert": 4, "model": 3}}
    config = changed(
        tiny,
        model={"d_model": 16, "dtype": "bfloat16"},
        moe={"num_selected_experts": 2, "router": "top_k", "train_capacity_factor": 1.5},
    )
    tokens = config.data.batch_size * (96 + 32) / 8  # of both stacks, which have a MoE layer each, on a device
    assert slot_bytes(config, plan) == 2 * 1.5 * tokens * 16 * 2
    dropless = changed(config, moe={"dropless": True})
    assert slot_bytes(dropless, plan) == config.moe.num_experts * tokens * 16 * 2


def test_utilization_is_three_forward_passes_at_the_largest_bound(tiny: Config) -> None:
    plan = PLAN.to_dict()
    flops = 3 * plan_benchmark.account(tiny).forward_flops * tiny.data.batch_size
    assert utilization(tiny, EIGHT, plan) == pytest.approx(flops / (8 * 197e12 * 2.5))


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_every_case_is_a_config_that_can_be_loaded() -> None:
    root = Path(plan_benchmark.__file__).parents[2]
    for case in [*FITS, *(case for _, _, *cases in RATIOS for case in cases)]:
        command.load_config(str(root / "configs" / case.config), case.arguments)


def test_a_case_that_no_slice_holds_ends_the_command(
    tiny: Config, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def smallest_fit(config: Config, chip: Chip, report: object) -> StepPlan:
        raise UserError("no slice of v5e fits")

    monkeypatch.setattr(plan_benchmark, "smallest_fit", smallest_fit)
    with pytest.raises(UserError, match="no slice"):
        tabulate_plans(lambda *_: tiny, tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_traffic_is_saved_whole(tiny: Config, tmp_path: Path, compiled: list[str]) -> None:
    tabulate_plans(lambda *_: tiny, tmp_path, lambda _: None)
    saved = json.loads((tmp_path / "switch_base-8-v5e-model.remat_full.json").read_text())
    assert Traffic(**saved["plan"]["collectives"]["all-to-all"]) == PLAN.collectives["all-to-all"]
