"""The benchmark times what it says, on a case small enough for a test."""

import pytest

from switchjax.analysis.layer_benchmark import LayerCase, LayerTimes, time_assignment, time_layer
from switchjax.config import ModelConfig


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_every_program_is_timed_in_both_directions(dtype: str, size: int) -> None:
    model = ModelConfig(d_model=8, d_ff=16, dtype=dtype)
    times = time_layer(LayerCase(4, 32, 2), num_tokens=64, model=model, capacity_factor=1.25, repeats=2)
    programs = {"dense", "gather", "einsum", "gather routing", "einsum routing"}
    assert times.forward.keys() == times.both.keys() == programs
    assert min(*times.forward.values(), *times.both.values()) > 0
    assert time_assignment(LayerCase(4, 32, 1), num_tokens=64, repeats=1).keys() == {"auction", "sinkhorn"}
    assert times.dispatched == 2 * 4 * 20 * 8 * size  # groups, experts, 1.25 * 2 * 32 / 4 slots, d_model
    assert times.temporaries.keys() == programs
    assert times.temporaries["einsum routing"] > 0


def test_a_ratio_of_1_is_the_cost_of_the_buffers_products() -> None:
    by_name = {"dense": 10.0, "gather": 25.0}
    times = LayerTimes(LayerCase(8, 512, 2), 1.25, by_name, {"dense": 10.0, "gather": 50.0}, {}, 0)
    assert times.to_dense("gather", both=False) == 1.0
    assert times.to_dense("gather", both=True) == 2.0
