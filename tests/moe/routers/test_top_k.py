"""Top-K against the rule by hand, with and without normalised gates."""

import numpy as np
import pytest

from tests.moe.routers.examples import (
    best,
    logits_of,
    probabilities,
    random_tokens,
    route,
    router_config,
    softmax,
    token_gates,
)


@pytest.mark.parametrize("selected", [1, 2, 4])
def test_raw_gates_are_the_probabilities(selected: int) -> None:
    config = router_config("top_k", num_selected_experts=selected, options={"normalize_gates": False})
    tokens = random_tokens()
    probs = probabilities(config, tokens)
    expected = np.zeros_like(probs)
    np.put_along_axis(expected, best(probs, selected), np.sort(probs, axis=-1)[..., ::-1][..., :selected], axis=-1)
    np.testing.assert_allclose(token_gates(route(config, tokens)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("selected", [2, 4])
def test_normalised_gates_are_the_softmax_over_the_chosen_logits(selected: int) -> None:
    config, tokens = router_config("top_k", num_selected_experts=selected), random_tokens()
    logits = logits_of(config, tokens)
    index = best(logits, selected)
    expected = np.zeros_like(logits)
    np.put_along_axis(expected, index, softmax(np.take_along_axis(logits, index, axis=-1)), axis=-1)
    np.testing.assert_allclose(token_gates(route(config, tokens)), expected, rtol=1e-5, atol=1e-7)


def test_a_single_expert_keeps_its_probability() -> None:
    tokens = random_tokens()
    top_1, switch = (route(router_config(name, num_selected_experts=1), tokens) for name in ("top_k", "switch"))
    np.testing.assert_array_equal(top_1.slot_gate, switch.slot_gate)
