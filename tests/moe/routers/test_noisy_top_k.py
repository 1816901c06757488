"""Noisy gating against the papers' equations by hand, token by token in float64, and against resampled noise."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.routers.noisy_top_k import MIN_NOISE, kth_excluding, load_probability, noisy_router, noisy_top_k
from switchjax.moe.routing import NoOptions, RouterSizes, Tokens
from tests.moe.routers.examples import (
    D,
    chosen_experts,
    compiled,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)
from tests.moe.routers.noisy_oracle import (
    cv_squared,
    drawn,
    gate_one_token,
    kth_excluding_by_loop,
    project,
    softplus,
)

TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_kth_excluding_is_the_kth_of_the_others_ties_included(k: int) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=(20, 5)), rng.integers(0, 3, size=(20, 5))]).astype(np.float32)
    expected = [kth_excluding_by_loop(row, k) for row in values]
    np.testing.assert_array_equal(
        jax.jit(partial(kth_excluding, k=k))(values.reshape(4, 10, 5)).reshape(40, 5), expected
    )


def test_kth_excluding_is_differentiated_through_the_values_that_it_returns() -> None:
    values = jnp.array([3.0, 1.0, 2.0, 0.0])
    jacobian = jax.jit(jax.jacobian(partial(kth_excluding, k=2)))(values)
    # Of (3, 1, 2, 0) the second highest is 2; without 3 or without 2 it is 1.
    np.testing.assert_array_equal(jacobian.argmax(axis=1), [1, 2, 1, 2])
    np.testing.assert_array_equal(jacobian.sum(axis=1), 1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_probability_is_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_again(k: int) -> None:
    rng = np.random.default_rng(1)
    experts, draws = 5, 20_000
    clean, std = rng.normal(size=experts), rng.uniform(0.3, 1.5, size=experts)
    noisy = clean + std * rng.normal(size=experts)
    single = (x.astype(np.float32) for x in (clean, std, noisy))
    probability = jax.jit(partial(load_probability, k=k))(*single)
    for i in range(experts):
        again = np.tile(noisy, (draws, 1))
        again[:, i] = clean[i] + std[i] * rng.normal(size=draws)
        chosen = np.argsort(-again, axis=-1)[:, :k] == i
        # 5 standard errors of a frequency; 1e-6 for an expert that is always or never chosen
        error = 5 * np.sqrt(probability[i] * (1 - probability[i]) / draws) + 1e-6
        np.testing.assert_allclose(chosen.any(axis=-1).mean(), probability[i], atol=error, rtol=0)
    assert np.ptp(probability) > 0.2


def test_load_probability_is_certain_where_all_experts_are_chosen() -> None:
    clean = jnp.array([0.0, 5.0])
    gradient = jax.jit(jax.grad(lambda c: jnp.sum(load_probability(c, jnp.ones(2), c, 2))))(clean)
    np.testing.assert_array_equal(load_probability(clean, jnp.ones(2), clean, 2), 1)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("k", [1, 2])
def test_the_load_estimate_of_a_token_is_unbiased_over_its_noise(k: int) -> None:
    """Its mean over many draws of the noise is the frequency with which the router chooses the expert."""
    copies, config = 4000, router_config("noisy_top_k", num_selected_experts=k)
    rng = np.random.default_rng(2)
    clean, raw = (jnp.asarray(np.tile(rng.normal(size=4), (copies, 1, 1)), jnp.float32) for _ in range(2))
    keys = jax.random.split(jax.random.key(0), copies)
    tokens = Tokens(jnp.zeros((copies, 1, D)), jnp.ones((copies, 1), bool), 1, keys=keys)
    choice = jax.jit(partial(noisy_top_k, config=config))(tokens, clean=clean, raw_std=raw)
    difference = np.asarray(choice.chosen, np.float64)[:, 0] - np.asarray(choice.load_probability)[:, 0]
    errors = difference.std(axis=0) / np.sqrt(copies)
    assert np.all(np.abs(difference.mean(axis=0)) < 5 * errors)  # 5 standard errors
    assert errors.min() > 0


def test_both_weights_start_at_0() -> None:
    weights = noisy_router(RouterSizes(D, 4), NoOptions(), jax.random.key(0))
    assert {name: weight.value.shape for name, weight in weights.items()} == {"logits": (D, 4), "noise": (D, 4)}
    assert not any(np.any(weight.value) for weight in weights.values())


def test_at_first_noise_alone_spreads_the_tokens_and_without_it_they_go_to_the_first_experts() -> None:
    config = router_config("noisy_top_k")
    weights = jax.tree.map(jnp.zeros_like, random_weights(config))
    trained = route(config, random_tokens(tokens=64, capacity=64, training=True), weights)
    assert np.all(np.asarray(trained.metrics.expert_load) > 10)
    evaluated = route(config, random_tokens(), weights)
    np.testing.assert_array_equal(evaluated.metrics.expert_load, [[16, 16, 0, 0]] * 2)
    np.testing.assert_array_equal(evaluated.slot_gate[:, :2], 0.5)


@TRAINING
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gates_and_losses_by_hand(k: int, training: bool) -> None:
    config = router_config("noisy_top_k", num_selected_experts=k)
    tokens, weights = random_tokens(padding=0.3, training=training), random_weights(config)
    routing = route(config, tokens, weights)
    clean, std = project(tokens, weights["logits"]), softplus(project(tokens, weights["noise"]))
    std = np.maximum(std, MIN_NOISE)
    noise = drawn(tokens, clean.shape[1:])
    for group in range(2):
        importance, load, gates = np.zeros(4), np.zeros(4), np.zeros((16, 4))
        real = np.flatnonzero(tokens.mask[group])
        for token in real:
            gates[token], best, probability = gate_one_token(
                clean[group, token], std[group, token], noise[group, token], k
            )
            importance, load = importance + gates[token], load + probability
            assert chosen_experts(routing)[group, token].tolist() == best
        np.testing.assert_allclose(token_gates(routing)[group], gates, rtol=1e-5, atol=1e-6)
        # Variances of a few float32 sums of 16; those that are 0 (K = E) cancel to a few units in the last place.
        expected = [len(real) * cv_squared(importance), len(real) * cv_squared(load)]
        actual = [routing.losses["importance_loss"][group], routing.losses["load_loss"][group]]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_losses_reach_both_weights_and_lower_the_crowded_experts_logit() -> None:
    config, tokens = router_config("noisy_top_k"), random_tokens(training=True)
    tokens = dataclasses.replace(tokens, x=jnp.abs(tokens.x))
    weights = {"logits": jnp.zeros((D, 4)).at[:, 2].set(0.3), "noise": jnp.zeros((D, 4))}
    for name in ("importance_loss", "load_loss"):
        gradient = jax.jit(jax.grad(lambda w, name=name: jnp.sum(compiled(config)(w, tokens).losses[name])))(weights)
        assert np.all(gradient["logits"].sum(axis=0)[2] > 0), name
        assert np.any(gradient["noise"] != 0), name


def test_huge_inputs_give_finite_values_and_gradients() -> None:
    config, tokens = router_config("noisy_top_k"), random_tokens(training=True)
    tokens = dataclasses.replace(tokens, x=1e15 * tokens.x)

    def total(weights: dict[str, jax.Array]) -> jax.Array:
        routing = compiled(config)(weights, tokens)
        return jnp.sum(routing.slot_gate) + sum(jnp.sum(loss) for loss in routing.losses.values())

    value, gradient = jax.jit(jax.value_and_grad(total))(random_weights(config))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient)))


def test_noise_differs_between_groups_and_steps_and_is_the_same_for_the_same_key() -> None:
    config = router_config("noisy_top_k")
    weights = jax.tree.map(jnp.zeros_like, random_weights(config))
    first, other = (random_tokens(training=True, seed=seed) for seed in (0, 1))
    chosen = chosen_experts(route(config, first, weights))
    np.testing.assert_array_equal(chosen, chosen_experts(route(config, first, weights)))
    assert np.any(chosen[0] != chosen[1])
    assert np.any(chosen != chosen_experts(route(config, other, weights)))


@pytest.mark.parametrize("name", ["noisy_top_k", "v_moe", "hierarchical"])
def test_experts_may_be_drawn_instead(name: str) -> None:
    config = dataclasses.replace(router_config(name), sample_experts=True)
    tokens = random_tokens(training=True)
    drawn_experts = route(config, tokens)
    assert np.all(np.sort(chosen_experts(drawn_experts), axis=-1)[..., 0] < chosen_experts(drawn_experts).max(axis=-1))
    assert np.any(chosen_experts(drawn_experts) != chosen_experts(route(router_config(name), tokens)))
    if name != "v_moe":
        np.testing.assert_allclose(token_gates(drawn_experts).sum(axis=-1), 1, rtol=1e-5)
