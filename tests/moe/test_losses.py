"""Losses and metrics against arithmetic done by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.losses import (
    RoutingMetrics,
    RoutingSummary,
    count_choices,
    importance_loss,
    load_balance_loss,
    load_loss,
    router_z_loss,
    sum_metrics,
    summarize,
)


def taken_of(index: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(mask)[..., None], index.shape)


def jitted_load_balance_loss(probs: np.ndarray, index: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(load_balance_loss)(probs.astype(np.float32), index.astype(np.int32), mask))


@pytest.mark.parametrize("selected", [1, 2, 4])
def test_load_balance_loss_is_1_a_token_at_perfect_balance(selected: int) -> None:
    experts = 8
    index = (np.arange(experts)[:, None] + np.arange(selected)) % experts  # each expert is chosen `selected` times
    probs = np.full((1, experts, experts), 1 / experts)
    loss = jitted_load_balance_loss(probs, index[None], np.ones((1, experts), bool))
    np.testing.assert_allclose(loss, [experts], rtol=1e-6)  # 8 tokens, each 1


@pytest.mark.parametrize("selected", [1, 2, 4])
def test_load_balance_loss_is_E_over_K_a_token_when_all_choose_the_same(selected: int) -> None:
    experts, tokens = 8, 5
    index = np.broadcast_to(np.arange(selected), (1, tokens, selected))
    probs = np.zeros((1, tokens, experts))
    probs[..., :selected] = 1 / selected
    loss = jitted_load_balance_loss(probs, index, np.ones((1, tokens), bool))
    np.testing.assert_allclose(loss, [tokens * experts / selected], rtol=1e-6)


def test_load_balance_loss_by_hand() -> None:
    # f = (2/3, 1/3, 0); P = ((.5 + .6 + .1) / 3, (.3 + .2 + .8) / 3, (.2 + .2 + .1) / 3) = (1.2, 1.3, .5) / 3
    probs = np.array([[[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]]])
    index = np.array([[[0], [0], [1]]])
    mean = 3 * (2 / 3 * 1.2 / 3 + 1 / 3 * 1.3 / 3)
    loss = jitted_load_balance_loss(probs, index, np.ones((1, 3), bool))
    np.testing.assert_allclose(loss, [3 * mean], rtol=1e-6)


def test_padding_adds_nothing_to_any_sum() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 4)).astype(np.float32)
    mask = np.array([[True, False, True, True, False, True], [False] * 6])

    def sums(logits: jax.Array, index: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        probs = jax.nn.softmax(logits)
        return {
            "load_balance_loss": load_balance_loss(probs, index, mask),
            "router_z_loss": router_z_loss(logits, mask),
            "importance_loss": importance_loss(probs, mask),
            "load_loss": load_loss(probs, mask),
        } | vars(sum_metrics(probs, index, taken_of(index, mask), jnp.zeros(index.shape[0], jnp.int32), mask))

    index = np.argsort(-logits, axis=-1)[..., :2].astype(np.int32)
    padded = jax.jit(sums)(logits, index, mask)
    alone = jax.jit(sums)(logits[:1, mask[0]], index[:1, mask[0]], np.ones((1, 4), bool))
    for name, values in padded.items():
        np.testing.assert_allclose(values[0], alone[name][0], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(values[1], np.zeros_like(values[1]), err_msg=name)


def test_load_balance_loss_pushes_the_crowded_experts_logit_down() -> None:
    logits = np.zeros((1, 4, 3), np.float32)
    index, mask = jnp.zeros((1, 4, 1), jnp.int32), jnp.ones((1, 4), bool)
    gradient = jax.jit(jax.grad(lambda logits: load_balance_loss(jax.nn.softmax(logits), index, mask)[0]))(logits)
    # dL/dlogit_e = E (f_e - 1/E) / E at uniform probabilities: 2/3 for the crowded expert, -1/3 for the others.
    np.testing.assert_allclose(gradient, np.broadcast_to([2 / 3, -1 / 3, -1 / 3], (1, 4, 3)), rtol=1e-6)


def test_router_z_loss_by_hand() -> None:
    logits = np.log(np.array([[[1.0, 2.0, 5.0], [2.0, 2.0, 1.0], [7.0, 8.0, 9.0]]])).astype(np.float32)
    logits[0, 1, 2] = -np.inf  # an expert that is out of the question is no obstacle
    loss = jax.jit(router_z_loss)(logits, np.array([[True, True, False]]))
    np.testing.assert_allclose(loss, [np.log(8) ** 2 + np.log(4) ** 2], rtol=1e-6)


@pytest.mark.parametrize("loss", [importance_loss, load_loss])
def test_importance_and_load_losses_by_hand(loss: Callable[..., jax.Array]) -> None:
    # Sums over the first two tokens (4, 1, 1): mean 2, variance (4 + 1 + 1) / 3 = 2, so CV^2 = 1/2, for 2 tokens.
    values = np.array([[[1.0, 0.0, 1.0], [3.0, 1.0, 0.0], [9.0, 9.0, 9.0]]], np.float32)
    np.testing.assert_allclose(jax.jit(loss)(values, np.array([[True, True, False]])), [2 * 0.5], rtol=1e-6)
    balanced = np.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]], np.float32)
    np.testing.assert_array_equal(jax.jit(loss)(balanced, np.ones((1, 3), bool)), [0])
    crowded = np.array([[[1.0, 0.0, 0.0]] * 3], np.float32)  # CV^2 = E - 1
    np.testing.assert_allclose(jax.jit(loss)(crowded, np.ones((1, 3), bool)), [3 * 2], rtol=1e-6)


@pytest.mark.parametrize("loss", [importance_loss, load_loss])
def test_importance_and_load_losses_of_padding_are_0_with_a_gradient_of_0(loss: Callable[..., jax.Array]) -> None:
    values = np.ones((2, 3, 4), np.float32)
    values[0, 0, 0] = 2
    mask = jnp.array([[True] * 3, [False] * 3])
    value, gradient = jax.jit(jax.value_and_grad(lambda values: jnp.sum(loss(values, mask))))(values)
    assert value > 0
    assert np.any(gradient[0] != 0)
    np.testing.assert_array_equal(gradient[1], 0)


def test_routing_metrics_by_hand() -> None:
    probs = np.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], np.float32)
    index = np.array([[[0], [0]]], np.int32)
    mask = np.ones((1, 2), bool)
    metrics = jax.jit(sum_metrics)(probs, index, mask[..., None], np.array([1], np.int32), mask)
    expected = {
        "tokens": [2],
        "routed": [2],
        "dispatched": [1],
        "expert_load": [[2, 0, 0]],
        "router_entropy": [np.log(2)],
        "router_confidence": [1.5],
    }
    assert vars(metrics).keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(metrics, name), values, rtol=1e-6, err_msg=name)


def test_counted_choices_by_hand() -> None:
    index = np.array([[[0, 2], [2, 1], [2, 0]], [[1, 0], [1, 2], [1, 2]]], np.int32)
    taken = np.array([[[True, True], [True, False], [True, True]], [[False, True], [False] * 2, [True, False]]])
    count = jax.jit(count_choices, static_argnums=2)(index, taken, 4)
    np.testing.assert_array_equal(count, [[2, 0, 3, 0], [1, 1, 0, 0]])


def test_metrics_have_no_gradient() -> None:
    probs = np.full((1, 2, 4), 0.25, np.float32)
    index, mask = jnp.zeros((1, 2, 1), jnp.int32), jnp.ones((1, 2), bool)

    def total(probs: jax.Array) -> jax.Array:
        metrics = sum_metrics(probs, index, mask[..., None], jnp.ones(1, jnp.int32), mask)
        return sum(jnp.sum(v) for v in jax.tree.leaves(metrics))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(probs), 0)


def test_summarize_divides_each_sum_by_what_it_was_summed_over() -> None:
    sums = {
        "tokens": np.array([4.0, 0.0]),  # the second layer saw padding only
        "routed": np.array([8.0, 0.0]),
        "dispatched": np.array([6.0, 0.0]),
        "router_entropy": np.array([1.0, 0.0]),
        "router_confidence": np.array([3.0, 0.0]),
        "expert_load": np.array([[4.0, 3.0, 1.0], [0.0, 0.0, 0.0]]),
    }
    summary = summarize(RoutingMetrics(**{name: jnp.asarray(values, jnp.float32) for name, values in sums.items()}))
    expected = {
        "router_entropy": [0.25, 0],
        "router_confidence": [0.75, 0],
        "fraction_tokens_dropped": [0.25, 0],
        "expert_load": [[0.5, 0.375, 0.125], [0, 0, 0]],
        "expert_load_top": [0.5, 0],
        "expert_load_bottom": [0.125, 0],
        "dead_experts": [0, 3],
    }
    properties = {name for name, value in vars(RoutingSummary).items() if isinstance(value, property)}
    assert vars(summary).keys() | properties == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(summary, name), values, err_msg=name)


def test_dead_experts_are_those_without_a_choice_in_each_layer() -> None:
    load = jnp.asarray([[4, 0, 0, 4], [2, 2, 2, 2], [0, 0, 1, 0]], jnp.float32)
    ones = jnp.ones(3)
    summary = jax.jit(summarize)(RoutingMetrics(ones, ones, ones, load, ones, ones))
    np.testing.assert_array_equal(summary.dead_experts, [2, 0, 3])
