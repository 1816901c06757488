"""BASE and S-BASE against the papers' rules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.assignment import balanced_assignment, sinkhorn
from switchjax.moe.losses import summarize
from switchjax.moe.routers.balanced import base_router
from switchjax.moe.routing import RouterSizes, Tokens, Weights
from tests.moe.routers.examples import (
    chosen_experts,
    compiled,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)


def scores_of(config: object, tokens: Tokens) -> np.ndarray:
    """In float64."""
    return np.asarray(tokens.x, np.float64) @ np.asarray(random_weights(config)["logits"], np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def skewed(tokens: Tokens, config: object) -> Tokens:
    """The tokens moved until most prefer the same expert."""
    towards = random_weights(config)["logits"][:, 0]
    return dataclasses.replace(tokens, x=tokens.x + towards[None, None])


class TestBase:
    @pytest.mark.parametrize("capacity", [1, 16])
    def test_in_training_each_expert_gets_its_share_whatever_the_capacity_factor(self, capacity: int) -> None:
        config = router_config("base")
        tokens = skewed(random_tokens(capacity=capacity, training=True), config)
        routing = route(config, tokens)
        assert routing.slot_token.shape == (2, 4, 4)
        np.testing.assert_array_equal(routing.metrics["expert_load"], 4)
        np.testing.assert_array_equal(routing.metrics["dispatched"], 16)
        assert np.bincount(scores_of(config, tokens).argmax(axis=-1).ravel()).max() > 16

    def test_in_training_experts_are_those_of_the_assignment_gates_the_sigmoids_of_the_scores(self) -> None:
        config, tokens = router_config("base"), random_tokens(padding=0.3, training=True)
        scores, mask = scores_of(config, tokens), np.asarray(tokens.mask)
        assign = jax.jit(balanced_assignment, static_argnums=(2, 3))
        expected = np.asarray(assign(scores.astype(np.float32), tokens.mask, 4, config.auction_rounds))
        routing = route(config, tokens)
        np.testing.assert_array_equal(chosen_experts(routing)[..., 0], expected)
        gates = np.where(np.arange(4) == expected[..., None], sigmoid(scores), 0)
        np.testing.assert_allclose(token_gates(routing), gates, rtol=1e-5)
        np.testing.assert_array_equal(routing.metrics["dispatched"], mask.sum(axis=1))

    def test_a_group_that_does_not_divide_is_not_dropped_from(self) -> None:
        config = router_config("base")
        routing = route(config, skewed(random_tokens(tokens=15, capacity=15, training=True), config))
        np.testing.assert_array_equal(routing.metrics["dispatched"], 15)
        assert np.asarray(routing.metrics["expert_load"]).max() == 4

    def test_in_evaluation_each_token_goes_to_its_best_expert_as_far_as_capacity_reaches(self) -> None:
        config, tokens = router_config("base"), random_tokens()
        scores = scores_of(config, tokens)
        routing = route(config, tokens)
        np.testing.assert_array_equal(chosen_experts(routing)[..., 0], scores.argmax(axis=-1))
        np.testing.assert_allclose(token_gates(routing).sum(axis=-1), sigmoid(scores.max(axis=-1)), rtol=1e-5)
        few = route(config, dataclasses.replace(tokens, capacity=3))
        assert few.slot_token.shape[2] == 3
        assert np.all(few.metrics["dispatched"] < few.metrics["routed"])

    @pytest.mark.parametrize("training", [False, True])
    def test_the_only_gradient_to_the_embeddings_is_through_the_sigmoid(self, training: bool) -> None:
        """Of `sum_s c_s sigmoid(x_s . w_e)` it is `sum_s c_s g_s (1 - g_s) x_s` over e's tokens; losses add none."""
        config, tokens = router_config("base"), random_tokens(training=training)
        coefficient = np.sin(np.arange(32.0)).reshape(2, 16)

        def total(weights: Weights) -> jax.Array:
            routing = compiled(config)(weights, tokens)
            by_token = jnp.pad(jnp.asarray(coefficient, jnp.float32), ((0, 0), (0, 1)))
            c = jnp.take_along_axis(by_token, routing.slot_token.reshape(2, -1), axis=1)
            return jnp.sum(c * routing.slot_gate.reshape(2, -1)) + sum(map(jnp.sum, routing.losses.values()))

        gradient = jax.jit(jax.grad(total))(random_weights(config))["logits"]
        gate = sigmoid(scores_of(config, tokens))
        chosen = chosen_experts(route(config, tokens)) == np.arange(4)
        slope = coefficient[..., None] * gate * (1 - gate) * chosen
        expected = np.einsum("gse,gsd->de", slope, np.asarray(tokens.x, np.float64))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)  # sums of float32 products

    def test_load_balance_is_1_in_training_and_that_of_the_choices_in_evaluation(self) -> None:
        config = router_config("base")
        for training in (True, False):
            tokens = skewed(random_tokens(training=training), config)
            routing = route(config, tokens)
            loss = summarize({k: v[0] for k, v in (routing.losses | routing.metrics).items()})["load_balance_loss"]
            if training:
                np.testing.assert_allclose(loss, 1, rtol=1e-5)
            else:
                assert loss > 1.2

    def test_at_the_bound_of_rounds_the_choice_is_still_balanced(self) -> None:
        config = router_config("base", auction_rounds=1)
        routing = route(config, skewed(random_tokens(training=True), config))
        np.testing.assert_array_equal(routing.metrics["expert_load"], 4)

    @pytest.mark.parametrize(("d_model", "experts"), [(16, 4), (4, 16)])
    def test_expert_embeddings_start_orthogonal_of_norm_a_tenth(self, d_model: int, experts: int) -> None:
        value = np.asarray(base_router(RouterSizes(d_model, experts), jax.random.key(0))["logits"].value)
        gram = value.T @ value if d_model >= experts else value @ value.T
        np.testing.assert_allclose(gram, 0.01 * np.eye(min(d_model, experts)), atol=1e-8)  # float32 of 0.01


class TestSinkhorn:
    def test_in_training_each_token_goes_to_the_argmax_of_the_plan_with_its_probability_as_gate(self) -> None:
        config = router_config("sinkhorn")
        tokens = skewed(random_tokens(padding=0.2, training=True), config)
        logits, mask = scores_of(config, tokens), np.asarray(tokens.mask)
        plan = jax.jit(sinkhorn, static_argnums=2)(logits.astype(np.float32), tokens.mask, 20)
        expected = np.asarray(plan).argmax(axis=-1)
        assert np.any(expected != logits.argmax(axis=-1))
        routing = route(config, tokens)
        np.testing.assert_array_equal(chosen_experts(routing)[..., 0], np.where(mask, expected, 4))
        probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        gates = np.where((np.arange(4) == expected[..., None]) & mask[..., None], probs, 0)
        np.testing.assert_allclose(token_gates(routing), gates, rtol=1e-4)  # of logits up to about 10 in float32

    def test_training_is_nearly_balanced_where_evaluation_is_not(self) -> None:
        config = router_config("sinkhorn")
        most = []
        for training in (True, False):
            routing = route(config, skewed(random_tokens(tokens=256, capacity=256, training=training), config))
            most.append(np.asarray(routing.metrics["expert_load"]).max() / 64)
        assert most[0] < 1.3
        assert most[1] > 2

    def test_in_evaluation_it_is_switch(self) -> None:
        tokens = random_tokens(capacity=3)
        routings = (route(router_config(name), tokens) for name in ("sinkhorn", "switch"))
        for actual, expected in zip(*map(jax.tree.leaves, routings), strict=True):
            np.testing.assert_array_equal(actual, expected)

    def test_the_gradient_to_the_router_is_that_of_the_gates_alone(self) -> None:
        """`d p_e = p_e (1[e = j] - p_j)`, whatever made the choice."""
        config, tokens = router_config("sinkhorn"), random_tokens(training=True)

        def total(weights: Weights) -> jax.Array:
            return jnp.sum(compiled(config)(weights, tokens).slot_gate)

        gradient = jax.jit(jax.grad(total))(random_weights(config))["logits"]
        logits = scores_of(config, tokens)
        probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        chosen = (chosen_experts(route(config, tokens)) == np.arange(4)).astype(float)
        gate = np.sum(chosen * probs, axis=-1, keepdims=True)
        expected = np.einsum("gse,gsd->de", gate * (chosen - probs), np.asarray(tokens.x, np.float64))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
