"""Expert choice: each expert takes its best tokens, and balance is perfect by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.routers.examples import random_tokens, random_weights, route, router_config, token_gates

CONFIG = router_config("expert_choice")


@pytest.mark.parametrize("padding", [0.0, 0.4])
def test_each_expert_takes_its_most_probable_tokens(padding: float) -> None:
    tokens = random_tokens(capacity=6, padding=padding)
    probs = np.asarray(jax.nn.softmax(tokens.x @ random_weights(CONFIG)["logits"], axis=-1))
    routing = route(CONFIG, tokens)
    assert routing.token_slot is None
    for group in range(2):
        real = np.flatnonzero(tokens.mask[group])
        for expert in range(4):
            best = real[np.argsort(-probs[group, real, expert], kind="stable")][:6]
            slots = np.asarray(routing.slot_token)[group, expert]
            assert slots[: len(best)].tolist() == best.tolist()
            assert np.all(slots[len(best) :] == 16)
            np.testing.assert_allclose(
                np.asarray(routing.slot_gate)[group, expert, : len(best)], probs[group, best, expert], rtol=1e-6
            )
    np.testing.assert_array_equal(np.asarray(routing.slot_gate)[np.asarray(routing.slot_token) == 16], 0)


def test_balance_is_perfect_and_a_token_no_expert_takes_is_dropped() -> None:
    tokens = random_tokens(capacity=2, padding=0.2)
    routing = route(CONFIG, tokens)
    count = np.asarray(tokens.mask).sum(axis=1)
    np.testing.assert_array_equal(routing.losses["load_balance_loss"], count)
    np.testing.assert_array_equal(routing.metrics.expert_load, 2)
    taken = (token_gates(routing) > 0).any(axis=-1).sum(axis=1)
    np.testing.assert_array_equal(routing.metrics.dispatched, taken)
    np.testing.assert_array_equal(routing.metrics.routed, count)
    assert np.all(taken < count)


def test_a_later_token_can_take_the_place_of_an_earlier_one() -> None:
    """This is the reason why a decoder refuses the router."""
    tokens = random_tokens(groups=1, capacity=2)
    weights = random_weights(CONFIG)
    other = tokens.x.at[0, -1].set(10 * weights["logits"][:, 0])
    before = np.asarray(route(CONFIG, tokens).slot_token)[0, 0]
    after = np.asarray(route(CONFIG, tokens.__class__(other, tokens.mask, 2)).slot_token)[0, 0]
    assert after.tolist() == [15, before[0]]


def test_the_router_gets_the_gradient_of_the_gates() -> None:
    tokens, weights = random_tokens(groups=1, tokens=4, capacity=1), random_weights(CONFIG)

    def total(logits: jax.Array) -> jax.Array:
        return jnp.sum(route(CONFIG, tokens, {"logits": logits}).slot_gate)

    def by_hand(logits: jax.Array) -> jax.Array:
        return jnp.sum(jnp.max(jax.nn.softmax(tokens.x @ logits, axis=-1), axis=1))

    gradient, expected = (jax.jit(jax.grad(f))(weights["logits"]) for f in (total, by_hand))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(gradient)).max() > 0.05
