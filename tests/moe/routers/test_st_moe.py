"""ST-MoE's top-2 against the paper's rule by hand."""

import numpy as np
import pytest

from tests.moe.routers.examples import chosen_experts, probabilities, random_tokens, route, router_config


@pytest.mark.parametrize("training", [False, True])
def test_the_second_expert_is_kept_where_its_gate_exceeds_the_threshold(training: bool) -> None:
    config = router_config("st_moe", options={"second_expert_threshold": 0.3})
    tokens = random_tokens(tokens=64, capacity=64, training=training)
    top_2 = np.sort(probabilities(config, tokens), axis=-1)[..., -2:]
    expected = top_2[..., 0] / top_2.sum(axis=-1) > 0.3
    assert 0.2 < expected.mean() < 0.8
    kept = chosen_experts(route(config, tokens))[..., 1] < config.num_experts
    np.testing.assert_array_equal(kept, expected)
