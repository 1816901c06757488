"""The benchmark times what it says, on a case small enough for a test."""

from importlib.util import find_spec

import pytest

from switchjax.accounting.hardware import parse_slice
from switchjax.config import ModelConfig, UserError
from switchjax.planning.topology import describe_devices
from switchjax.studies import layer_benchmark
from switchjax.studies.compile_benchmark import compiled_programs_in
from switchjax.studies.layer_benchmark import (
    LayerCase,
    benchmark_layer,
    cases_of,
    plan_layer,
    time_assignment,
    time_layer,
)
from switchjax.studies.markdown import read_tables

CASE = LayerCase(4, 32, 2)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_every_program_is_timed_in_both_directions(dtype: str, size: int) -> None:
    model = ModelConfig(d_model=8, d_ff=16, dtype=dtype)
    times = time_layer(CASE, 64, model, ["gather", "einsum", "ragged"], repeats=2)
    assert times.keys() == {"gather", "einsum", "ragged"}
    for found in times.values():
        assert min(found.forward.dense, found.forward.ratio.low, found.both.ratio.low, found.routing) > 0
        assert found.both.dense == times["gather"].both.dense
    rows = 2 * 4 * 20  # groups, experts, 1.25 * 2 * 32 / 4 slots
    assert times["gather"].dispatched == times["einsum"].dispatched == rows * 8 * size
    assert times["ragged"].dispatched == 64 * 2 * 8 * size
    assert times["einsum"].temporaries > 0


def test_the_table_has_a_row_for_each_model_case_and_form() -> None:
    models = [ModelConfig(d_model=size, d_ff=16) for size in (8, 16)]
    told: list[str] = []
    text = benchmark_layer(models, [CASE], 64, ["gather", "einsum"], 1, told.append)
    _, *rows = read_tables(text)[0]
    assert [row[:3] for row in rows] == [
        [f"{size}, float32", "4, 32, 2", form] for size in (8, 16) for form in ("gather", "einsum")
    ]
    assert told == [line for line in text.splitlines() if line.startswith("| ") and "float32" in line]
    assert "auction" in text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")
def test_gathers_add_no_flops_on_tpus_and_einsums_do() -> None:
    model = ModelConfig(d_model=128, d_ff=256, dtype="bfloat16")
    device = describe_devices(parse_slice("v5e:1x1"))[0]
    case = LayerCase(8, 1024, 2)
    with compiled_programs_in(None):  # what is compiled for a device that is not there cannot be read again
        flops = {form: plan_layer(case, 2048, model, form, device)[0] for form in ("gather", "einsum", "ragged")}
    assert 1 <= flops["gather"] < 1.15
    assert 1 <= flops["ragged"] < 1.15
    assert flops["einsum"] > 2


def test_cases_are_found_by_their_experts() -> None:
    assert {(case.num_experts, case.num_selected) for case in cases_of([8, 64])} == {(8, 1), (8, 2), (64, 1), (64, 2)}
    with pytest.raises(UserError, match=r"no case has 9 experts \(known: 8, 16, 64, 128, 512\)"):
        cases_of([8, 9])


def test_balanced_assignment_is_timed() -> None:
    assert min(time_assignment(LayerCase(4, 32, 1), groups=2, repeats=1).values()) > 0


def test_ratios_are_to_as_many_rows_as_the_experts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_benchmark, "interleaved_seconds", lambda programs, _: {name: [1.0] for name in programs})
    times = time_layer(CASE, 64, ModelConfig(d_model=8, d_ff=16), ["gather", "ragged"], repeats=1)
    assert times["gather"].both.ratio.median == pytest.approx(1 / 2.5)  # 1.25 * K slots a token
    assert times["ragged"].forward.ratio.median == pytest.approx(1 / 2)
