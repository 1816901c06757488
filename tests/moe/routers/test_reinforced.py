"""Reinforced routing: sampled by its policy in training, greedy in evaluation, and what its loss needs to know."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.routers.examples import (
    chosen_experts,
    compiled,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)

CONFIG = router_config("reinforced")


def policy(tokens: object) -> np.ndarray:
    """In float64."""
    logits = np.asarray(tokens.x, np.float64) @ np.asarray(random_weights(CONFIG)["logits"], np.float64)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_in_evaluation_the_most_probable_expert_is_taken() -> None:
    tokens = random_tokens()
    np.testing.assert_array_equal(chosen_experts(route(CONFIG, tokens))[..., 0], policy(tokens).argmax(axis=-1))


def test_in_training_experts_are_drawn_from_the_policy() -> None:
    copies = 4000
    tokens = random_tokens(groups=1, tokens=8, capacity=8)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), tokens)
    repeated = dataclasses.replace(repeated, keys=jax.random.split(jax.random.key(0), copies))
    chosen = chosen_experts(route(CONFIG, repeated))
    frequency = (chosen == np.arange(CONFIG.num_experts)).mean(axis=0)
    np.testing.assert_allclose(frequency, policy(tokens)[0], atol=5 * 0.5 / np.sqrt(copies))  # 5 standard errors


@pytest.mark.parametrize("training", [False, True])
def test_gate_log_policy_and_baseline_are_those_of_the_chosen_expert(training: bool) -> None:
    tokens = random_tokens(padding=0.3, training=training)
    routing, mask = route(CONFIG, tokens), np.asarray(tokens.mask)
    chosen = np.where(mask[..., None], chosen_experts(routing), 0)
    expected = np.take_along_axis(policy(tokens), chosen, axis=-1)[..., 0]
    np.testing.assert_allclose(token_gates(routing).sum(axis=-1), np.where(mask, expected, 0), rtol=1e-5)
    log_policy = np.where(mask, np.log(expected), 0)
    np.testing.assert_allclose(routing.token_values["log_policy"], log_policy, rtol=1e-5, atol=1e-6)
    baseline = np.asarray(tokens.x, np.float64) @ np.asarray(random_weights(CONFIG)["baseline"], np.float64)
    np.testing.assert_allclose(
        routing.token_values["baseline"], np.where(mask, baseline[..., 0], 0), rtol=1e-5, atol=1e-6
    )


def test_the_entropy_loss_is_the_sum_of_the_negative_entropies() -> None:
    tokens = random_tokens(padding=0.3)
    probs = policy(tokens)
    expected = np.sum(np.where(tokens.mask, np.sum(probs * np.log(probs), axis=-1), 0), axis=1)
    np.testing.assert_allclose(route(CONFIG, tokens).losses["policy_entropy_loss"], expected, rtol=1e-5)


def test_a_policy_that_is_sure_has_finite_losses_and_gradients() -> None:
    tokens = random_tokens(training=True)
    weights = jax.tree.map(lambda leaf: 1e4 * leaf, random_weights(CONFIG))

    def total(weights: dict[str, jax.Array]) -> jax.Array:
        routing = compiled(CONFIG)(weights, tokens)
        return jnp.sum(routing.losses["policy_entropy_loss"]) + jnp.sum(routing.token_values["log_policy"])

    value, gradient = jax.jit(jax.value_and_grad(total))(weights)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient.values())


def test_the_baseline_does_not_shape_the_tokens() -> None:
    tokens, weights = random_tokens(training=True), random_weights(CONFIG)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(compiled(CONFIG)(weights, dataclasses.replace(tokens, x=x)).token_values["baseline"])

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(tokens.x), 0)
