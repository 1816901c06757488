"""Sigmoid scores with a balancing bias, against the papers' rules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig, UserError
from switchjax.moe.routers import check_router, router_options
from switchjax.moe.routers.sigmoid import SigmoidOptions, move_bias, sigmoid_router
from switchjax.moe.routing import RouterSizes, Tokens
from tests.moe.layers import make_inputs, make_layer, report_of
from tests.moe.routers.examples import (
    D,
    best,
    chosen_experts,
    compiled,
    logits_of,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)

KEY = jax.random.key(7)
BIAS = jnp.array([0.3, -0.5, 0.1, 0.2])


def sigmoids(config: MoEConfig, tokens: Tokens) -> np.ndarray:
    """The logistic function in float64."""
    return 1 / (1 + np.exp(-logits_of(config, tokens)))


def biased(config: MoEConfig, bias: jax.Array) -> dict[str, jax.Array]:
    return random_weights(config) | {"bias": bias}


def test_the_bias_starts_at_0_and_is_not_trained() -> None:
    weights = sigmoid_router(RouterSizes(D, 4), SigmoidOptions(), jax.random.key(0))
    assert {name: weight.trained for name, weight in weights.items()} == {"logits": True, "bias": False}
    np.testing.assert_array_equal(weights["bias"].value, np.zeros(4))
    assert np.any(weights["logits"].value != 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bias_chooses_and_the_scores_alone_weigh(k: int, normalize: bool) -> None:
    config = router_config("sigmoid", num_selected_experts=k, options={"normalize_gates": normalize})
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
    np.testing.assert_allclose(route(config, tokens).metrics.router_confidence, confidence, rtol=1e-5)


def loads(config: MoEConfig, tokens: Tokens) -> np.ndarray:
    """The number of choices (two per token) that fall on each expert, group by group [G, E], by hand."""
    chosen = best(sigmoids(config, tokens) + np.asarray(BIAS), 2)
    return np.array([np.bincount(c[real].ravel(), minlength=4) for c, real in zip(chosen, tokens.mask, strict=True)])


@pytest.mark.parametrize("training", [False, True])
def test_the_load_is_counted_before_capacity_and_without_padding_and_the_bias_moves_by_the_sign_of_its_excess(
    training: bool,
) -> None:
    config = router_config("sigmoid", options={"bias_update_rate": 0.03})
    tokens, weights = random_tokens(capacity=2, padding=0.3, training=training), biased(config, BIAS)
    routing = route(config, tokens, weights)
    load = loads(config, tokens)
    assert routing.state_sums.keys() == {"load"}
    np.testing.assert_array_equal(routing.state_sums["load"], load)
    assert np.any(routing.metrics.dispatched < routing.metrics.routed), "nothing was dropped"

    moved = move_bias(weights, {"load": routing.state_sums["load"].sum(axis=0)}, router_options(config))
    excess = load.sum(axis=0) - load.sum() / 4
    assert np.any(excess > 0)
    assert moved.keys() == {"bias"}
    np.testing.assert_allclose(moved["bias"], np.asarray(BIAS) - 0.03 * np.sign(excess), rtol=1e-6)


@pytest.mark.parametrize(
    ("load", "steps"),
    [
        ([5, 1, 3, 3], [-1, 1, 0, 0]),  # the mean is 3; how far from it does not matter
        ([9, 1, 1, 1], [-1, 1, 1, 1]),
        ([2, 1, 1, 1], [-1, 1, 1, 1]),  # the mean is 1.25
        ([7, 7, 7, 7], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),  # a step of padding
    ],
)
def test_the_bias_falls_where_the_load_exceeds_the_mean_rises_below_it_and_stays_at_it(
    load: list[int], steps: list[int]
) -> None:
    sums = {"load": jnp.asarray(load, jnp.float32)}
    options = SigmoidOptions(bias_update_rate=0.25)
    moved = jax.jit(move_bias, static_argnums=2)({"bias": BIAS, "logits": jnp.ones((D, 4))}, sums, options)
    np.testing.assert_array_equal(moved["bias"], BIAS + 0.25 * jnp.asarray(steps, jnp.float32))


def test_a_group_of_padding_has_no_load() -> None:
    config, tokens = router_config("sigmoid"), random_tokens()
    tokens = dataclasses.replace(tokens, mask=tokens.mask.at[1].set(False))
    load = route(config, tokens, biased(config, BIAS)).state_sums["load"]
    np.testing.assert_array_equal(load, [loads(config, tokens)[0], [0, 0, 0, 0]])
    assert load[0].sum() == 32


@pytest.mark.parametrize("training", [False, True])
def test_the_bias_gets_no_gradient_and_the_load_gives_none(training: bool) -> None:
    config, tokens = router_config("sigmoid"), random_tokens(training=training)

    def total(weights: dict[str, jax.Array]) -> jax.Array:
        routing = compiled(config)(weights, tokens)
        gates = jnp.sin(jnp.arange(128.0)).reshape(routing.slot_gate.shape) * routing.slot_gate
        return jnp.sum(gates) + sum(jnp.sum(sums) for sums in (routing.losses | routing.state_sums).values())

    gradient = jax.jit(jax.grad(total))(biased(config, BIAS))
    np.testing.assert_array_equal(gradient["bias"], 0)
    assert np.all(gradient["logits"] != 0)

    def load(weights: dict[str, jax.Array]) -> jax.Array:
        sums = compiled(config)(weights, tokens).state_sums["load"]
        return jnp.sum(jnp.sin(jnp.arange(8.0)).reshape(2, 4) * sums)

    for values in jax.jit(jax.grad(load))(biased(config, BIAS)).values():
        np.testing.assert_array_equal(values, 0)


def test_groups_and_micro_batches_add_up_to_the_same_step() -> None:
    layer = make_layer(
        router="sigmoid", num_selected_experts=2, options={"bias_update_rate": 0.03}, jitter_noise=0.0, group_size=16
    )
    x, mask = make_inputs()
    whole = report_of(layer, x, mask, KEY).state_sums
    halves = [report_of(layer, x[rows], mask[rows], KEY).state_sums for rows in (slice(None, 8), slice(8, None))]
    assert np.any(halves[0]["load"] != halves[1]["load"])
    added = jax.tree.map(jnp.add, *halves)
    jax.tree.map(np.testing.assert_array_equal, added, whole)

    scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ np.asarray(layer.router["logits"][...], np.float64))))
    bias = np.asarray(layer.router["bias"][...])
    load = np.bincount(best(scores + bias, 2)[mask].ravel(), minlength=4)
    np.testing.assert_array_equal(whole["load"], load)
    moved = layer.next_state(added)
    assert moved.keys() == {"router/bias"}
    np.testing.assert_allclose(moved["router/bias"], bias - 0.03 * np.sign(load - load.mean()), rtol=1e-6)


def test_steps_by_sign_balance_crowded_experts() -> None:
    config = router_config("sigmoid", num_experts=8, options={"bias_update_rate": 0.004})
    tokens = random_tokens(groups=4, tokens=256, capacity=256, padding=0.1)
    crowd = jnp.linspace(-1.0, 1.0, 8)  # the first feature is 1: a logit that all tokens share
    tokens = dataclasses.replace(tokens, x=tokens.x.at[..., 0].set(1.0))
    weights = biased(config, jnp.zeros(8))
    weights["logits"] = (0.5 * weights["logits"]).at[0].set(crowd)

    @jax.jit
    def step(weights: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        sums = jax.tree.map(lambda load: jnp.sum(load, axis=0), compiled(config)(weights, tokens).state_sums)
        moved = move_bias(weights, sums, router_options(config))
        return weights | moved, jnp.max(sums["load"]) / jnp.mean(sums["load"])

    worst = []
    for _ in range(100):
        weights, imbalance = step(weights)
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
    with pytest.raises(UserError, match=r"moe\.router=sigmoid also by its bias: set moe\.no_token_left_behind=0"):
        check_router(router_config("sigmoid", no_token_left_behind=1))
