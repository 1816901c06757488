"""The parts that routers share: the choice of experts, noise keyed by group."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.choice import is_chosen, jitter, normalize_over_chosen, select_experts, values_of_chosen
from switchjax.moe.routing import Tokens
from tests.moe.routers.examples import best, random_tokens, router_config


def test_jitter_multiplies_by_noise_within_its_range_and_of_mean_1() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    factors = np.asarray(jax.jit(jitter, static_argnums=1)(np.ones((4, 64, 32), np.float32), 0.1, keys))
    assert factors.min() >= 0.9
    assert factors.max() <= 1.1
    np.testing.assert_allclose([factors.min(), factors.max()], [0.9, 1.1], atol=1e-3)  # of 8192 draws 0.2 wide
    np.testing.assert_allclose(factors.mean(), 1, atol=5 * 0.2 / np.sqrt(12 * factors.size))  # 5 standard errors
    doubled = np.asarray(jax.jit(jitter, static_argnums=1)(np.full((4, 64, 32), 2, np.float32), 0.1, keys))
    np.testing.assert_array_equal(doubled, 2 * factors)


def test_jitter_of_a_group_depends_on_its_own_key_only() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = np.ones((3, 4, 8), np.float32)
    together = np.asarray(jax.jit(jitter, static_argnums=1)(x, 0.1, keys))
    assert not np.array_equal(together[0], together[1])
    np.testing.assert_array_equal(jax.jit(jitter, static_argnums=1)(x[1:], 0.1, keys[1:]), together[1:])


def test_each_purpose_and_each_group_draws_its_own_numbers() -> None:
    tokens = random_tokens(groups=3, training=True)
    first, again, second = (
        np.asarray(tokens.random(purpose, lambda key: jax.random.uniform(key, (8,)))) for purpose in ("a", "a", "b")
    )
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == second)
    assert len(np.unique(first)) == first.size


@pytest.mark.parametrize("selected", [1, 2, 5])
def test_the_highest_scores_are_selected_in_order_the_first_among_equals_first(selected: int) -> None:
    scores = np.random.default_rng(0).integers(0, 4, size=(2, 16, 5)).astype(np.float32)
    config = router_config("top_k", num_experts=5, num_selected_experts=selected)
    index = jax.jit(lambda tokens, scores: select_experts(tokens, config, scores))(random_tokens(), scores)
    np.testing.assert_array_equal(index, best(scores, selected))


def test_values_of_the_chosen_by_hand() -> None:
    values = np.arange(1.0, 9.0, dtype=np.float32).reshape(1, 2, 4)
    index = jnp.array([[[2, 0], [1, 3]]], jnp.int32)
    weight = np.array([[[1.0, 10.0], [100.0, 1000.0]]], np.float32)

    def weighed(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = values_of_chosen(values, index)
        return jnp.sum(weight * chosen), chosen

    gradient, chosen = jax.jit(jax.grad(weighed, has_aux=True))(values)
    np.testing.assert_array_equal(chosen, [[[3, 1], [6, 8]]])
    np.testing.assert_array_equal(gradient, [[[10, 0, 1, 0], [0, 100, 0, 1000]]])
    np.testing.assert_array_equal(is_chosen(index, 4), [[[True, False, True, False], [False, True, False, True]]])
    normalized = jax.jit(normalize_over_chosen)(values, index)
    np.testing.assert_allclose(normalized, values / np.array([[[4.0], [14.0]]]), rtol=1e-6)


def test_sampled_experts_follow_the_softmax_in_training_only() -> None:
    copies = 8000
    logits = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]]))
    config = router_config("switch", num_experts=3, sample_experts=True)
    keys = jax.random.split(jax.random.key(2), copies)
    tokens = Tokens(jnp.zeros((copies, 1, 1)), jnp.ones((copies, 1), bool), 1, keys=keys)
    drawn = np.asarray(select_experts(tokens, config, jnp.repeat(logits, copies, axis=0)))
    np.testing.assert_allclose(
        np.bincount(drawn.reshape(-1)) / copies, [0.5, 0.3, 0.2], atol=5 * 0.5 / np.sqrt(copies)
    )  # 5 standard errors
    quiet = dataclasses.replace(tokens, keys=None)
    assert np.all(np.asarray(select_experts(quiet, config, jnp.repeat(logits, copies, axis=0))) == 0)
