"""A stack is divided into as few different layers as it has."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from switchjax.config import Layer
from switchjax.models.scan_periods import Run, find_runs

D, M, B = Layer("dense", 0), Layer("moe", 8), Layer("base", 8)
M32, M64 = Layer("moe", 32), Layer("moe", 64)


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        pytest.param([D] * 24, [Run((D,), 24)], id="dense"),
        pytest.param([D, M] * 12, [Run((D, M), 12)], id="every other"),
        pytest.param([D, D, D, M] * 6, [Run((D, D, D, M), 6)], id="every fourth"),
        pytest.param([D] * 8 + [D, M] * 2, [Run((D,), 8), Run((D, M), 2)], id="last two"),
        pytest.param([D] * 12 + [B] + [D] * 12, [Run((D,), 12), Run((B,), 1), Run((D,), 12)], id="inserted"),
        pytest.param([D, M32] * 10 + [D, M64] * 2, [Run((D, M32), 10), Run((D, M64), 2)], id="pyramid"),
        pytest.param([D, M] * 10 + [D], [Run((D, M), 10), Run((D,), 1)], id="odd depth"),
        pytest.param([M], [Run((M,), 1)], id="single"),
    ],
)
def test_the_published_stacks(layers: list[Layer], runs: list[Run]) -> None:
    assert list(find_runs(layers)) == runs


@hypothesis.given(st.lists(st.sampled_from([D, M, B, M32]), min_size=1, max_size=14))
def test_runs_unrolled_are_the_stack_and_their_periods_have_one_number_of_experts(layers: list[Layer]) -> None:
    runs = find_runs(layers)
    assert [layer for run in runs for _ in range(run.repeats) for layer in run.period] == layers
    for run in runs:
        assert len({layer.num_experts for layer in run.period} - {0}) <= 1
    changes = 1 + sum(a != b for a, b in itertools.pairwise(layers))
    assert sum(len(run.period) for run in runs) <= changes  # at most one body a stretch of equal layers
