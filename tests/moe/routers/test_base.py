"""BASE against the paper's rules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.assignment import balanced_assignment
from switchjax.moe.routers import router_options
from switchjax.moe.routers.base import BaseOptions, base_router
from switchjax.moe.routing import RouterSizes, Weights
from tests.moe.reports import means_of
from tests.moe.routers.examples import (
    chosen_experts,
    compiled,
    logits_of,
    random_tokens,
    random_weights,
    route,
    router_config,
    skewed,
    token_gates,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("capacity", [1, 16])
def test_in_training_each_expert_gets_its_share_whatever_the_capacity_factor(capacity: int) -> None:
    config = router_config("base")
    tokens = skewed(random_tokens(capacity=capacity, training=True), config)
    routing = route(config, tokens)
    assert routing.slot_token.shape == (2, 4, 4)
    np.testing.assert_array_equal(routing.metrics.expert_load, 4)
    np.testing.assert_array_equal(routing.metrics.dispatched, 16)
    assert np.bincount(logits_of(config, tokens).argmax(axis=-1).ravel()).max() > 16


def test_in_training_experts_are_those_of_the_assignment_gates_the_sigmoids_of_the_scores() -> None:
    config, tokens = router_config("base"), random_tokens(padding=0.3, training=True)
    scores, mask = logits_of(config, tokens), np.asarray(tokens.mask)
    assign = jax.jit(balanced_assignment, static_argnums=(2, 3))
    expected = np.asarray(assign(scores.astype(np.float32), tokens.mask, 4, router_options(config).auction_rounds))
    routing = route(config, tokens)
    np.testing.assert_array_equal(chosen_experts(routing)[..., 0], expected)
    gates = np.where(np.arange(4) == expected[..., None], sigmoid(scores), 0)
    np.testing.assert_allclose(token_gates(routing), gates, rtol=1e-5)
    np.testing.assert_array_equal(routing.metrics.dispatched, mask.sum(axis=1))


def test_a_group_that_does_not_divide_is_not_dropped_from() -> None:
    config = router_config("base")
    routing = route(config, skewed(random_tokens(tokens=15, capacity=15, training=True), config))
    np.testing.assert_array_equal(routing.metrics.dispatched, 15)
    assert np.asarray(routing.metrics.expert_load).max() == 4


def test_in_evaluation_each_token_goes_to_its_best_expert_as_far_as_capacity_reaches() -> None:
    config, tokens = router_config("base"), random_tokens()
    scores = logits_of(config, tokens)
    routing = route(config, tokens)
    np.testing.assert_array_equal(chosen_experts(routing)[..., 0], scores.argmax(axis=-1))
    np.testing.assert_allclose(token_gates(routing).sum(axis=-1), sigmoid(scores.max(axis=-1)), rtol=1e-5)
    few = route(config, dataclasses.replace(tokens, capacity=3))
    assert few.slot_token.shape[2] == 3
    assert np.all(few.metrics.dispatched < few.metrics.routed)


@pytest.mark.parametrize("training", [False, True])
def test_the_only_gradient_to_the_embeddings_is_through_the_sigmoid(training: bool) -> None:
    """The gradient of `sum_s c_s sigmoid(x_s . w_e)` is `sum_s c_s g_s (1 - g_s) x_s` over e's tokens; losses add 0."""
    config, tokens = router_config("base"), random_tokens(training=training)
    coefficient = np.sin(np.arange(32.0)).reshape(2, 16)

    def total(weights: Weights) -> jax.Array:
        routing = compiled(config)(weights, tokens)
        by_token = jnp.pad(jnp.asarray(coefficient, jnp.float32), ((0, 0), (0, 1)))
        c = jnp.take_along_axis(by_token, routing.slot_token.reshape(2, -1), axis=1)
        return jnp.sum(c * routing.slot_gate.reshape(2, -1)) + sum(map(jnp.sum, routing.losses.values()))

    gradient = jax.jit(jax.grad(total))(random_weights(config))["logits"]
    gate = sigmoid(logits_of(config, tokens))
    chosen = chosen_experts(route(config, tokens)) == np.arange(4)
    slope = coefficient[..., None] * gate * (1 - gate) * chosen
    expected = np.einsum("gse,gsd->de", slope, np.asarray(tokens.x, np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)  # sums of float32 products


def test_load_balance_is_1_in_training_and_that_of_the_choices_in_evaluation() -> None:
    config = router_config("base")
    for training in (True, False):
        tokens = skewed(random_tokens(training=training), config)
        routing = route(config, tokens)
        loss = means_of(routing)["load_balance_loss"][0]
        if training:
            np.testing.assert_allclose(loss, 1, rtol=1e-5)
        else:
            assert loss > 1.2


def test_at_the_bound_of_rounds_the_choice_is_still_balanced() -> None:
    config = router_config("base", options={"auction_rounds": 1})
    routing = route(config, skewed(random_tokens(training=True), config))
    np.testing.assert_array_equal(routing.metrics.expert_load, 4)


@pytest.mark.parametrize(("d_model", "experts"), [(16, 4), (4, 16)])
def test_expert_embeddings_start_orthogonal_of_norm_a_tenth(d_model: int, experts: int) -> None:
    value = np.asarray(base_router(RouterSizes(d_model, experts), BaseOptions(), jax.random.key(0))["logits"].value)
    gram = value.T @ value if d_model >= experts else value @ value.T
    np.testing.assert_allclose(gram, 0.01 * np.eye(min(d_model, experts)), atol=1e-8)  # float32 of 0.01
