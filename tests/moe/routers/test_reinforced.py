"""Reinforced routing: sampled by its policy in training, greedy in evaluation, and the policy's loss."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.routers import router_options
from switchjax.moe.routers.reinforced import REINFORCED, policy_loss, route_reinforced
from switchjax.moe.routing import Tokens
from tests.moe.routers.examples import (
    chosen_experts,
    compiled,
    probabilities,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)

CONFIG = router_config("reinforced")


policy = partial(probabilities, CONFIG)


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


def test_the_gradient_of_a_bandit_of_two_arms_is_unbiased() -> None:
    samples, preferences, rewards = 20_000, np.array([0.4, -0.3]), np.array([-1.5, -0.5])
    config = router_config("reinforced", num_experts=2)
    # The token is its own logits; the baseline expects -1.1 of it.
    weights = {"logits": jnp.eye(2), "baseline": jnp.asarray([[-2.0], [1.0]])}
    keys = jax.random.split(jax.random.key(0), samples)

    def loss(x: jax.Array) -> jax.Array:
        tokens = Tokens(x, jnp.ones((samples, 1), bool), 1, keys=keys)
        routing = route_reinforced(weights, tokens, config, router_options(config))
        reward = jnp.asarray(rewards, jnp.float32)[routing.token_slot[..., 0]]  # one slot an expert
        values = {name: value[None] for name, value in routing.token_values.items()}
        return policy_loss(values, reward, jnp.ones((samples, 1), bool))["policy_loss"][0]

    x = jnp.broadcast_to(jnp.asarray(preferences, jnp.float32), (samples, 1, 2))
    gradients = np.asarray(jax.jit(jax.grad(loss))(x), np.float64)[:, 0]
    probs = np.exp(preferences) / np.exp(preferences).sum()
    exact = -probs * (rewards - probs @ rewards)  # of -E[R]
    error = gradients.std(axis=0) / np.sqrt(samples)
    assert np.all(error < 0.1 * np.abs(exact))  # so that a biased estimate would show
    assert np.all(np.abs(gradients.mean(axis=0) - exact) < 5 * error)


def random_inputs(layers: int = 2) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """The values, rewards and mask of tokens."""
    rng = np.random.default_rng(0)
    shapes = {"log_policy": (layers, 3, 5), "baseline": (layers, 3, 5), "reward": (3, 5)}
    values = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    reward = values.pop("reward")
    return values, reward, jnp.asarray(rng.uniform(size=(3, 5)) < 0.7)


def test_the_policys_loss_by_a_loop_over_layers_and_real_tokens() -> None:
    values, reward, mask = jax.tree.map(np.asarray, random_inputs())
    expected = np.zeros(2)
    for layer, row, token in np.ndindex(2, 3, 5):
        if mask[row, token]:
            advantage = float(reward[row, token]) - float(values["baseline"][layer, row, token])
            expected[layer] += -advantage * values["log_policy"][layer, row, token] + advantage**2 / 2
    losses = jax.jit(policy_loss)(*random_inputs())
    assert losses.keys() == {"policy_loss"}
    np.testing.assert_allclose(losses["policy_loss"], expected, rtol=1e-5)
    assert REINFORCED.reward_losses is policy_loss


def test_the_baseline_learns_the_reward_and_the_reward_learns_nothing() -> None:
    values, reward, mask = random_inputs()

    def total(values: dict[str, jax.Array], reward: jax.Array) -> jax.Array:
        return jnp.sum(policy_loss(values, reward, mask)["policy_loss"])

    gradients, of_reward = jax.jit(jax.grad(total, argnums=(0, 1)))(values, reward)
    error = values["baseline"] - reward[None]
    np.testing.assert_allclose(gradients["baseline"], jnp.where(mask[None], error, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients["log_policy"], jnp.where(mask[None], error, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(of_reward, 0)
