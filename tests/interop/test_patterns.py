"""Sparse layers are where transformers places them, and the pattern that repeats is found."""

import pytest

from switchjax.config import UserError
from switchjax.interop.patterns import find_pattern, sparse_kinds, sparse_step


@pytest.mark.parametrize(
    ("layers", "step", "routed"),
    [(4, 1, [0, 1, 2, 3]), (6, 2, [1, 3, 5]), (12, 4, [1, 5, 9]), (6, 6, [1]), (3, 2, [1])],
)
def test_every_so_many_layers_from_the_second_on_have_experts(layers: int, step: int, routed: list[int]) -> None:
    kinds = sparse_kinds(layers, step)
    assert [i for i, kind in enumerate(kinds) if kind == "moe"] == routed
    assert sparse_kinds(layers, sparse_step(kinds)) == kinds


def test_one_pattern_fits_stacks_of_different_depths() -> None:
    assert find_pattern([sparse_kinds(8, 4), sparse_kinds(4, 4)]) == ("dense", "moe", "dense", "dense")
    assert find_pattern([sparse_kinds(2, 1), sparse_kinds(3, 1)]) == ("moe",)
    assert find_pattern([("dense",) * 6]) == ("dense",)


@pytest.mark.parametrize("stacks", [[sparse_kinds(4, 2), sparse_kinds(4, 1)], [sparse_kinds(3, 2), sparse_kinds(4, 2)]])
def test_stacks_without_a_common_pattern_are_refused(stacks: list[tuple[str, ...]]) -> None:
    with pytest.raises(UserError, match=r"no one model.pattern"):
        find_pattern(stacks)


def test_a_stack_that_no_step_makes_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not support the layers moe, dense"):
        sparse_step(("moe", "dense"))
