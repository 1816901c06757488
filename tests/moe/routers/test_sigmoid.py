"""Sigmoid scores with a balancing bias, against the papers' rules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig, UserError
from switchjax.moe.layer import check_router
from switchjax.moe.losses import summarize
from switchjax.moe.routers.sigmoid import sigmoid_router
from switchjax.moe.routing import RouterSizes, Tokens
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

BIAS = jnp.array([0.3, -0.5, 0.1, 0.2])


def sigmoids(config: MoEConfig, tokens: Tokens) -> np.ndarray:
    """In float64."""
    weight = np.asarray(random_weights(config)["logits"], np.float64)
    return 1 / (1 + np.exp(-np.asarray(tokens.x, np.float64) @ weight))


def biased(config: MoEConfig, bias: jax.Array) -> dict[str, jax.Array]:
    return random_weights(config) | {"bias": bias}


def test_the_bias_starts_at_0_and_moves_by_sign() -> None:
    weights = sigmoid_router(RouterSizes(D, 4), jax.random.key(0))
    assert {name: weight.update for name, weight in weights.items()} == {"logits": "gradient", "bias": "sign"}
    np.testing.assert_array_equal(weights["bias"].value, np.zeros(4))
    assert np.any(weights["logits"].value != 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bias_chooses_and_the_scores_alone_weigh(k: int, normalize: bool) -> None:
    config = router_config("sigmoid", num_selected_experts=k, normalize_gates=normalize)
    tokens = random_tokens()
    routing = route(config, tokens, biased(config, BIAS))
    s = sigmoids(config, tokens)
    index = np.argsort(-(s + np.asarray(BIAS, np.float64)), axis=-1)[..., :k]
    np.testing.assert_array_equal(chosen_experts(routing), index)
    assert k == 4 or np.any(np.sort(index) != np.sort(np.argsort(-s, axis=-1)[..., :k])), "the bias changes nothing"
    chosen = np.take_along_axis(s, index, axis=-1)
    expected = np.zeros_like(s)
    np.put_along_axis(expected, index, chosen / chosen.sum(-1, keepdims=True) if normalize and k > 1 else chosen, -1)
    np.testing.assert_allclose(token_gates(routing), expected, rtol=1e-5, atol=1e-7)


def test_probabilities_are_the_scores_over_their_sum() -> None:
    config, tokens = router_config("sigmoid"), random_tokens(padding=0.3)
    s = sigmoids(config, tokens)
    probs = s / s.sum(axis=-1, keepdims=True)
    confidence = np.sum(probs.max(axis=-1), axis=1, where=np.asarray(tokens.mask))
    np.testing.assert_allclose(route(config, tokens).metrics["router_confidence"], confidence, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_bias_loss_is_0_and_its_gradient_the_excess_load_before_capacity_and_without_padding(
    training: bool,
) -> None:
    config, tokens = router_config("sigmoid"), random_tokens(capacity=2, padding=0.3, training=training)

    def bias_loss(weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        losses = compiled(config)(weights, tokens).losses["bias_loss"]
        return jnp.sum(losses), losses

    weights = biased(config, BIAS)
    gradient, losses = jax.jit(jax.grad(bias_loss, has_aux=True))(weights)
    np.testing.assert_array_equal(losses, [0, 0])
    best = np.argsort(-(sigmoids(config, tokens) + np.asarray(BIAS)), axis=-1)[..., :2]
    load = np.bincount(best[np.asarray(tokens.mask)].reshape(-1), minlength=4)
    np.testing.assert_allclose(gradient["bias"], load - load.mean(), rtol=1e-6)
    np.testing.assert_array_equal(gradient["logits"], 0)
    routing = route(config, tokens, weights)
    assert np.any(routing.metrics["dispatched"] < routing.metrics["routed"]), "nothing was dropped"
    assert summarize(routing.losses | routing.metrics)["bias_loss"].tolist() == [0, 0]


def test_the_bias_gets_no_gradient_from_gates_and_other_losses() -> None:
    config, tokens = router_config("sigmoid"), random_tokens()

    def total(weights: dict[str, jax.Array]) -> jax.Array:
        routing = compiled(config)(weights, tokens)
        others = [loss for name, loss in routing.losses.items() if name != "bias_loss"]
        gates = jnp.sin(jnp.arange(128.0)).reshape(routing.slot_gate.shape) * routing.slot_gate
        return jnp.sum(gates) + sum(jnp.sum(loss) for loss in others)

    gradient = jax.jit(jax.grad(total))(biased(config, BIAS))
    np.testing.assert_array_equal(gradient["bias"], 0)
    assert np.all(gradient["logits"] != 0)


def test_steps_by_sign_balance_crowded_experts() -> None:
    config = router_config("sigmoid", num_experts=8)
    tokens = random_tokens(groups=4, tokens=256, capacity=256, padding=0.1)
    crowd = jnp.linspace(-1.0, 1.0, 8)  # the first feature is 1: a logit that all tokens share
    tokens = dataclasses.replace(tokens, x=tokens.x.at[..., 0].set(1.0))
    weights = biased(config, jnp.zeros(8))
    weights["logits"] = (0.5 * weights["logits"]).at[0].set(crowd)

    @jax.jit
    def step(weights: dict[str, jax.Array], rate: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        def loss(weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            routing = compiled(config)(weights, tokens)
            return jnp.sum(routing.losses["bias_loss"]), jnp.sum(routing.metrics["expert_load"], axis=0)

        gradient, load = jax.grad(loss, has_aux=True)(weights)
        return weights | {"bias": weights["bias"] - rate * jnp.sign(gradient["bias"])}, jnp.max(load) / jnp.mean(load)

    worst = []
    for _ in range(100):
        weights, imbalance = step(weights, jnp.float32(0.004))
        worst.append(float(imbalance))
    assert worst[0] > 1.8
    # A step of 0.004 moves a few of about 230 choices of an expert back and forth.
    assert max(worst[-10:]) < 1.1


def test_experts_may_be_drawn_in_proportion_to_score_plus_bias() -> None:
    config = router_config("sigmoid", num_experts=3, num_selected_experts=1, sample_experts=True)
    copies, s, bias = 8000, np.array([0.5, 0.3, 0.1]), np.array([0.0, 0.2, -0.2])
    tokens = Tokens(
        jnp.ones((copies, 1, 1)),
        jnp.ones((copies, 1), bool),
        1,
        keys=jax.random.split(jax.random.key(0), copies),
    )
    logits = np.log(s / (1 - s))[None]
    weights = {"logits": jnp.asarray(logits, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    routing = route(config, tokens, weights)
    frequency = np.bincount(chosen_experts(routing).reshape(-1), minlength=3) / copies
    np.testing.assert_allclose(frequency, [0.5, 0.5, 0], atol=5 * 0.5 / np.sqrt(copies))  # 5 standard errors
    np.testing.assert_allclose(token_gates(routing).sum(axis=-1), s[chosen_experts(routing)[..., 0]], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e15])
def test_saturated_scores_give_gates_that_sum_to_1_and_finite_gradients(scale: float) -> None:
    config, tokens = router_config("sigmoid"), random_tokens()
    tokens = dataclasses.replace(tokens, x=scale * jnp.abs(tokens.x))

    def total(weights: dict[str, jax.Array]) -> tuple[jax.Array, object]:
        routing = compiled(config)(weights, tokens)
        return jnp.sum(routing.slot_gate) + sum(jnp.sum(loss) for loss in routing.losses.values()), routing

    # Every logit far below 0, but for the last expert's, which the bias rules out: the chosen s all underflow.
    weights = {"logits": jnp.full((D, 4), -1.0).at[:, 3].set(1.0), "bias": jnp.array([0.0, 0.0, 0.0, -2.0])}
    gradient, routing = jax.jit(jax.grad(total, has_aux=True))(weights)
    np.testing.assert_array_equal(chosen_experts(routing), np.broadcast_to([0, 1], (2, 16, 2)))
    np.testing.assert_allclose(token_gates(routing).sum(axis=-1), 1, rtol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_no_token_is_sent_on_past_the_bias() -> None:
    with pytest.raises(UserError, match=r"chooses by its bias too: set moe\.no_token_left_behind=0"):
        check_router(router_config("sigmoid", no_token_left_behind=1))
