"""The layer benchmark on a small case."""

from importlib.util import find_spec

import pytest

from switchjax.accounting.hardware import parse_slice
from switchjax.config import UserError
from switchjax.planning.topology import describe_devices
from switchjax.studies.compile_benchmark import compiled_programs_in
from switchjax.studies.layer_benchmark import (
    FORMS,
    LayerCase,
    LayerSizes,
    cases_of,
    plan_layer,
    time_assignment,
    time_layer,
)
from tests.studies.written import check_written

CASE = LayerCase(4, 32, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_program_is_timed_in_both_directions(dtype: str) -> None:
    sizes = LayerSizes(8, dtype)
    rows = time_layer(CASE, 64, sizes, FORMS, repeats=2)
    assert [row.dispatch for row in rows] == list(FORMS)
    for row in rows:
        assert (row.sizes, row.case) == (sizes, CASE)
        assert min(row.dense_forward_ms, row.forward_ratio.low, row.both_ratio.low, row.routing_ms) > 0
        assert row.dense_both_ms == rows[0].dense_both_ms
    # 2 groups, 4 experts, 1.25 * 2 * 32 / 4 slots; without slots 2 choices of 64 tokens.
    assert [row.expert_rows for row in rows] == [2 * 4 * 20, 2 * 4 * 20, 64 * 2]
    assert rows[1].temporaries_ratio > 0

    rows += time_assignment(LayerCase(4, 32, 1), groups=2, repeats=1)
    layers, (auction, sinkhorn) = check_written(rows, "docs/performance.md")
    assert layers[0].startswith(f"| 8, {dtype} | 4, 32, 2 | gather | ")
    assert auction.startswith("| auction | 64 | 4 | ")
    assert sinkhorn.startswith("| sinkhorn | 64 | 4 | ")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")
def test_gathers_add_no_flops_on_tpus_and_einsums_do() -> None:
    device = describe_devices(parse_slice("v5e:1x1"))[0]
    case = LayerCase(8, 1024, 2)
    with compiled_programs_in(None):  # a cached program for an absent device cannot be loaded
        flops = {form: plan_layer(case, 2048, LayerSizes(64, "bfloat16"), form, device)[0] for form in FORMS}
    assert 1 <= flops["gather"] < 1.15
    assert 1 <= flops["ragged"] < 1.15
    assert flops["einsum"] > 2


def test_cases_are_found_by_their_experts() -> None:
    assert {(case.num_experts, case.num_selected) for case in cases_of([8, 64])} == {(8, 1), (8, 2), (64, 1), (64, 2)}
    with pytest.raises(UserError, match=r"no case has 9 experts \(known: 8, 16, 64, 128, 512\)"):
        cases_of([8, 9])
