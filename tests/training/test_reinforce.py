"""The policy's loss: an unbiased gradient, the rewards of packed sequences, no gradient through the reward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from switchjax.training.reinforce import policy_loss, rewards_of_segments, with_policy_losses

from switchjax.moe.routers.reinforced import route_reinforced
from switchjax.moe.routing import Tokens
from tests.moe.routers.examples import router_config


def test_the_gradient_of_a_bandit_of_two_arms_is_unbiased() -> None:
    samples, preferences, rewards = 20_000, np.array([0.4, -0.3]), np.array([-1.5, -0.5])
    config = router_config("reinforced", num_experts=2)
    # The token is its own logits; the baseline expects -1.1 of it.
    weights = {"logits": jnp.eye(2), "baseline": jnp.asarray([[-2.0], [1.0]])}
    keys = jax.random.split(jax.random.key(0), samples)

    def loss(x: jax.Array) -> jax.Array:
        routing = route_reinforced(weights, Tokens(x, jnp.ones((samples, 1), bool), 1, keys=keys), config)
        reward = jnp.asarray(rewards, jnp.float32)[routing.token_slot[..., 0]]  # one slot an expert
        values = {name: value[None] for name, value in routing.token_values.items()}
        return policy_loss(values["log_policy"], values["baseline"], reward, jnp.ones((samples, 1), bool))[0]

    x = jnp.broadcast_to(jnp.asarray(preferences, jnp.float32), (samples, 1, 2))
    gradients = np.asarray(jax.jit(jax.grad(loss))(x), np.float64)[:, 0]
    probs = np.exp(preferences) / np.exp(preferences).sum()
    exact = -probs * (rewards - probs @ rewards)  # of -E[R]
    error = gradients.std(axis=0) / np.sqrt(samples)
    assert np.all(error < 0.1 * np.abs(exact))  # so that a biased estimate would show
    assert np.all(np.abs(gradients.mean(axis=0) - exact) < 5 * error)


def random_inputs(layers: int = 2) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"log_policy": (layers, 3, 5), "baseline": (layers, 3, 5), "reward": (3, 5)}
    values = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return values | {"mask": jnp.asarray(rng.uniform(size=(3, 5)) < 0.7)}


def test_the_loss_by_a_loop_over_layers_and_real_tokens() -> None:
    inputs = {name: np.asarray(value) for name, value in random_inputs().items()}
    expected = np.zeros(2)
    for layer, row, token in np.ndindex(2, 3, 5):
        if inputs["mask"][row, token]:
            advantage = float(inputs["reward"][row, token]) - float(inputs["baseline"][layer, row, token])
            expected[layer] += -advantage * inputs["log_policy"][layer, row, token] + advantage**2 / 2
    np.testing.assert_allclose(jax.jit(policy_loss)(**random_inputs()), expected, rtol=1e-5)


def test_the_baseline_learns_the_reward_and_the_reward_learns_nothing() -> None:
    inputs = random_inputs()

    def total(inputs: dict[str, jax.Array], mask: jax.Array) -> jax.Array:
        return jnp.sum(policy_loss(**inputs, mask=mask))

    mask = inputs.pop("mask")
    gradients = jax.jit(jax.grad(total))(inputs, mask)
    error = inputs["baseline"] - inputs["reward"][None]
    np.testing.assert_allclose(gradients["baseline"], jnp.where(mask[None], error, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients["log_policy"], jnp.where(mask[None], error, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(gradients["reward"], 0)


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0]])
TARGET_SEGMENTS = np.array([[1, 2, 2, 0], [1, 1, 2, 0], [0, 0, 0, 0]])  # the third of the second row was cut off


def test_an_encoder_token_earns_the_mean_log_probability_of_its_own_sequence() -> None:
    log_probs = np.random.default_rng(0).normal(size=TARGET_SEGMENTS.shape).astype(np.float32)
    expected = np.zeros(SEGMENTS.shape)
    for row, token in np.ndindex(*SEGMENTS.shape):
        own = log_probs[row][TARGET_SEGMENTS[row] == SEGMENTS[row, token]]
        if SEGMENTS[row, token] and len(own):
            expected[row, token] = own.mean(dtype=np.float64)
    rewards = jax.jit(rewards_of_segments)(log_probs, TARGET_SEGMENTS, SEGMENTS)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_values_of_tokens_give_way_to_a_loss_of_each_layer() -> None:
    rng = np.random.default_rng(0)
    log_probs = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    segments = {"encoder": jnp.asarray(SEGMENTS), "decoder": jnp.asarray(TARGET_SEGMENTS)}
    routing = {
        stack: [
            {
                "tokens": jnp.ones(2),
                "log_policy": jnp.asarray(rng.normal(size=(2, 3, length)), jnp.float32),
                "baseline": jnp.asarray(rng.normal(size=(2, 3, length)), jnp.float32),
            }
        ]
        for stack, length in (("encoder", 6), ("decoder", 4))
    }
    losses = jax.jit(with_policy_losses)(routing, log_probs, segments["decoder"], segments)
    assert all(set(sums) == {"tokens", "policy_loss"} for runs in losses.values() for sums in runs)
    encoder_rewards = rewards_of_segments(log_probs, segments["decoder"], segments["encoder"])
    rewards = {"encoder": encoder_rewards, "decoder": log_probs}
    for stack, (sums,) in routing.items():
        loss = partial(policy_loss, sums["log_policy"], sums["baseline"])
        expected = loss(rewards[stack], segments[stack] > 0)
        np.testing.assert_allclose(losses[stack][0]["policy_loss"], expected, rtol=1e-6)


def test_routing_of_other_routers_is_left_alone() -> None:
    routing = {"decoder": [{"tokens": jnp.ones(2), "router_z_loss": jnp.ones(2)}]}
    segments = jnp.asarray(TARGET_SEGMENTS)
    assert with_policy_losses(routing, jnp.zeros((3, 4)), segments, {"decoder": segments}) == routing
