"""V-MoE against the paper's equations by hand, token by token in float64."""

import numpy as np
import pytest
from scipy.special import ndtr

from tests.moe.routers.examples import (
    chosen_experts,
    random_tokens,
    random_weights,
    route,
    router_config,
    softmax,
    token_gates,
)
from tests.moe.routers.noisy_oracle import cv_squared, drawn, project


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_by_hand(training: bool) -> None:
    config = router_config("v_moe", num_experts=8)
    tokens, weights = random_tokens(padding=0.3, training=training), random_weights(config)
    routing = route(config, tokens, weights)
    clean, std = project(tokens, weights["logits"]), 1 / 8
    noise = drawn(tokens, clean.shape[1:])
    for group in range(2):
        importance, load, gates = np.zeros(8), np.zeros(8), np.zeros((16, 8))
        real = np.flatnonzero(tokens.mask[group])
        for token in real:
            noisy = clean[group, token] + std * noise[group, token]
            best = np.argsort(-noisy)[:2]
            gates[token, best] = softmax(noisy)[best]
            importance += softmax(clean[group, token])
            load += ndtr((clean[group, token] - noisy[best[1]]) / std) if training else np.isin(np.arange(8), best)
            assert chosen_experts(routing)[group, token].tolist() == best.tolist()
        np.testing.assert_allclose(token_gates(routing)[group], gates, rtol=1e-5, atol=1e-6)
        expected = [len(real) * cv_squared(importance), len(real) * cv_squared(load)]
        actual = [routing.losses["importance_loss"][group], routing.losses["load_loss"][group]]
        np.testing.assert_allclose(actual, expected, rtol=1e-4)  # variances of float32 sums


def test_all_experts_may_be_chosen() -> None:
    routing = route(router_config("v_moe", num_selected_experts=4), random_tokens(training=True))
    np.testing.assert_allclose(token_gates(routing).sum(axis=-1), 1, rtol=1e-5)
    assert np.all(np.isfinite(routing.losses["load_loss"]))
