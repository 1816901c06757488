"""Fields of the section `moe` change what the layer or the router computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.assignment import balanced_assignment, sinkhorn
from tests.moe.layers import LENGTH, D, make_layer, run
from tests.moe.routers.examples import chosen_experts, random_tokens, random_weights, route, router_config

KEY = jax.random.key(7)


def test_input_dropout_zeroes_what_the_router_sees_and_scales_up_the_rest() -> None:
    """With one expert, the z-loss is the squared logit: a sum of `D` ones, each kept with probability 1 - rate."""
    rows, rate = 256, 0.25
    layer = make_layer(num_experts=1, group_size=LENGTH, jitter_noise=0.0, input_dropout=rate)
    layer.router["logits"][...] = jnp.ones_like(layer.router["logits"][...])
    x, mask = np.ones((rows, LENGTH, D), np.float32), np.ones((rows, LENGTH), bool)
    squares = [float(run(layer, x, mask, key)[1]["router_z_loss"]) / mask.sum() for key in (None, KEY)]
    assert squares[0] == pytest.approx(D**2, rel=1e-5)
    kept = np.random.default_rng(0).binomial(D, 1 - rate, 100_000) / (1 - rate)
    error = np.std(kept**2) / np.sqrt(mask.sum())
    assert squares[1] == pytest.approx(D**2 + D * rate / (1 - rate), abs=5 * error)  # 5 standard errors
    assert abs(squares[1] - D**2) > 1e-3


def test_sinkhorn_takes_as_many_iterations_as_it_is_told() -> None:
    config = router_config("sinkhorn", options={"sinkhorn_iterations": 2}, num_experts=8)
    tokens, weights = random_tokens(tokens=64, capacity=64, training=True), random_weights(config)
    logits = tokens.x @ weights["logits"]
    plan = jax.jit(sinkhorn, static_argnums=2)
    few, many = (np.argmax(plan(logits, tokens.mask, n), axis=-1) for n in (2, 20))
    assert np.any(few != many)
    np.testing.assert_array_equal(chosen_experts(route(config, tokens, weights))[..., 0], few)


def test_an_auction_ends_after_as_many_rounds_as_it_is_told() -> None:
    config = router_config("base", options={"auction_rounds": 3})
    tokens, weights = random_tokens(tokens=32, capacity=32, training=True), random_weights(config)
    scores = tokens.x @ weights["logits"]
    assign = jax.jit(balanced_assignment, static_argnums=(2, 3))
    few, many = (np.asarray(assign(scores, tokens.mask, 8, rounds)) for rounds in (3, 2000))
    assert np.any(few != many)
    np.testing.assert_array_equal(chosen_experts(route(config, tokens, weights))[..., 0], few)


def test_no_token_left_behind_sends_on_as_often_as_it_is_told() -> None:
    """Four tokens have the same ranking of four experts with one slot each, so each round places one more."""
    tokens = random_tokens(groups=1, tokens=4, capacity=1)
    tokens = dataclasses.replace(tokens, x=jnp.ones_like(tokens.x))
    for rounds in range(4):
        config = router_config("switch", no_token_left_behind=rounds)
        weights = {"logits": jnp.broadcast_to(jnp.array([[4.0, 3.0, 2.0, 1.0]]), (tokens.x.shape[-1], 4))}
        placed = chosen_experts(route(config, tokens, weights))[0, :, 0]
        np.testing.assert_array_equal(placed, [*range(rounds + 1), *[4] * (3 - rounds)])
