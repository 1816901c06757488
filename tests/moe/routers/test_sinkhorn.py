"""S-BASE against the paper's rules by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from switchjax.moe.assignment import sinkhorn
from switchjax.moe.routing import Weights
from tests.moe.routers.examples import (
    chosen_experts,
    compiled,
    logits_of,
    random_tokens,
    random_weights,
    route,
    router_config,
    skewed,
    softmax,
    token_gates,
)


def test_in_training_each_token_goes_to_the_argmax_of_the_plan_with_its_probability_as_gate() -> None:
    config = router_config("sinkhorn")
    tokens = skewed(random_tokens(padding=0.2, training=True), config)
    logits, mask = logits_of(config, tokens), np.asarray(tokens.mask)
    plan = jax.jit(sinkhorn, static_argnums=2)(logits.astype(np.float32), tokens.mask, 20)
    expected = np.asarray(plan).argmax(axis=-1)
    assert np.any(expected != logits.argmax(axis=-1))
    routing = route(config, tokens)
    np.testing.assert_array_equal(chosen_experts(routing)[..., 0], np.where(mask, expected, 4))
    probs = softmax(logits)
    gates = np.where((np.arange(4) == expected[..., None]) & mask[..., None], probs, 0)
    np.testing.assert_allclose(token_gates(routing), gates, rtol=1e-4)  # of logits up to about 10 in float32


def test_training_is_nearly_balanced_where_evaluation_is_not() -> None:
    config = router_config("sinkhorn")
    most = []
    for training in (True, False):
        routing = route(config, skewed(random_tokens(tokens=256, capacity=256, training=training), config))
        most.append(np.asarray(routing.metrics.expert_load).max() / 64)
    assert most[0] < 1.3
    assert most[1] > 2


def test_in_evaluation_it_is_switch() -> None:
    tokens = random_tokens(capacity=3)
    routings = (route(router_config(name), tokens) for name in ("sinkhorn", "switch"))
    for actual, expected in zip(*map(jax.tree.leaves, routings), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_gradient_to_the_router_is_that_of_the_gates_alone() -> None:
    """`d p_e = p_e (1[e = j] - p_j)`, however e was chosen."""
    config, tokens = router_config("sinkhorn"), random_tokens(training=True)

    def total(weights: Weights) -> jax.Array:
        return jnp.sum(compiled(config)(weights, tokens).slot_gate)

    gradient = jax.jit(jax.grad(total))(random_weights(config))["logits"]
    logits = logits_of(config, tokens)
    probs = softmax(logits)
    chosen = (chosen_experts(route(config, tokens)) == np.arange(4)).astype(float)
    gate = np.sum(chosen * probs, axis=-1, keepdims=True)
    expected = np.einsum("gse,gsd->de", gate * (chosen - probs), np.asarray(tokens.x, np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
