"""A stack is divided so that as few layers as possible are compiled."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from switchjax.config import Layer
from switchjax.models.scan_periods import ScannedPeriods, scan_periods

D, M, B = Layer("dense", 0), Layer("moe", 8), Layer("base", 8)
M32, M64 = Layer("moe", 32), Layer("moe", 64)


@pytest.mark.parametrize(
    ("layers", "scans"),
    [
        pytest.param([D] * 24, [ScannedPeriods((D,), 24)], id="dense"),
        pytest.param([D, M] * 12, [ScannedPeriods((D, M), 12)], id="every other"),
        pytest.param([D, D, D, M] * 6, [ScannedPeriods((D, D, D, M), 6)], id="every fourth"),
        pytest.param([D] * 8 + [D, M] * 2, [ScannedPeriods((D,), 8), ScannedPeriods((D, M), 2)], id="last two"),
        pytest.param(
            [D] * 12 + [B] + [D] * 12,
            [ScannedPeriods((D,), 12), ScannedPeriods((B,), 1), ScannedPeriods((D,), 12)],
            id="inserted",
        ),
        pytest.param(
            [D, M32] * 10 + [D, M64] * 2, [ScannedPeriods((D, M32), 10), ScannedPeriods((D, M64), 2)], id="pyramid"
        ),
        pytest.param([D, M] * 10 + [D], [ScannedPeriods((D, M), 10), ScannedPeriods((D,), 1)], id="odd depth"),
        pytest.param([M], [ScannedPeriods((M,), 1)], id="single"),
    ],
)
def test_the_published_stacks(layers: list[Layer], scans: list[ScannedPeriods]) -> None:
    assert list(scan_periods(layers)) == scans


@hypothesis.given(st.lists(st.sampled_from([D, M, B, M32]), min_size=1, max_size=14))
def test_scans_unrolled_are_the_stack_and_their_periods_have_one_number_of_experts(layers: list[Layer]) -> None:
    scans = scan_periods(layers)
    assert [layer for scan in scans for _ in range(scan.repeats) for layer in scan.period] == layers
    for scan in scans:
        assert len({layer.num_experts for layer in scan.period} - {0}) <= 1
    changes = 1 + sum(a != b for a, b in itertools.pairwise(layers))
    assert sum(len(scan.period) for scan in scans) <= changes  # at most one body a stretch of equal layers
