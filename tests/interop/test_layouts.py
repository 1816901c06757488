"""Layouts equal transposes and reshapes by hand, and round-trip."""

import numpy as np
import pytest

from switchjax.interop.layouts import Layout

SIZES = {"a": 4, "p": 2, "q": 2, "c": 3}


def array(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize(
    ("pattern", "ours", "theirs"),
    [
        ("i o -> o i", array(3, 5), array(3, 5).T),
        ("d h a -> (h a) d", array(5, 3, 4), array(5, 12).T),
        ("h a d -> d (h a)", array(3, 4, 5), array(12, 5).T),
        ("h a -> (h a)", array(3, 4), array(12)),
        ("d -> 1 1 d", array(5), array(1, 1, 5)),
        ("(p q c) d -> d c p q", array(12, 5), array(2, 2, 3, 5).transpose(3, 2, 0, 1)),
    ],
)
def test_a_pattern_is_read_in_both_directions(pattern: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    layout = Layout(pattern, SIZES)
    np.testing.assert_array_equal(layout.to_theirs(ours), theirs)
    np.testing.assert_array_equal(layout.to_ours(theirs), ours)
    assert layout.their_shape(ours.shape) == theirs.shape
