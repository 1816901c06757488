"""Switch against the paper's rule by hand."""

import jax.numpy as jnp
import numpy as np

from tests.moe.routers.examples import (
    best,
    chosen_experts,
    probabilities,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)


def test_each_token_goes_to_its_argmax_with_that_probability_as_gate() -> None:
    config, tokens = router_config("switch"), random_tokens()
    probs = probabilities(config, tokens)
    routing = route(config, tokens)
    np.testing.assert_array_equal(chosen_experts(routing), best(probs, 1))
    # never renormalised to 1
    np.testing.assert_allclose(token_gates(routing).sum(axis=-1), probs.max(axis=-1), rtol=1e-5)


def test_equal_probabilities_go_to_the_first_expert() -> None:
    config, tokens = router_config("switch"), random_tokens(groups=1, tokens=3, capacity=3)
    routing = route(config, tokens, {"logits": jnp.zeros_like(random_weights(config)["logits"])})
    assert routing.slot_token[0].tolist() == [[0, 1, 2], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    np.testing.assert_array_equal(routing.slot_gate[0, 0], 0.25)
