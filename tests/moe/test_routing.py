"""What routers share: gates in slots, noise keyed by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.routing import gates_of_slots, jitter
from tests.moe.examples import CASES, fill_one_by_one, random_choices
from tests.moe.routers.examples import random_tokens


@pytest.mark.parametrize("name", ["switch", "top-2", "top-4"])
def test_each_slot_carries_the_gate_of_its_choice(name: str) -> None:
    case = CASES[name]
    choices = random_choices(case, seed=3)
    slot_choice = np.full((case.groups, case.experts, case.capacity), case.selected * case.tokens, np.int32)
    choice_slot = np.full((case.groups, case.tokens, case.selected), case.experts * case.capacity, np.int32)
    expected = np.zeros(slot_choice.shape, np.float32)
    placed = fill_one_by_one(choices, case)
    for (group, token, k), (expert, position) in placed.items():
        slot_choice[group, expert, position] = k * case.tokens + token
        choice_slot[group, token, k] = expert * case.capacity + position
        expected[group, expert, position] = choices.gate[group, token, k]

    def total(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = gates_of_slots(gate, jnp.asarray(slot_choice), jnp.asarray(choice_slot))
        return jnp.sum(gates), gates

    gradient, gates = jax.jit(jax.grad(total, has_aux=True))(choices.gate)
    np.testing.assert_array_equal(gates, expected)
    kept = np.zeros(choices.gate.shape)
    kept[tuple(np.array(list(placed)).T)] = 1
    np.testing.assert_array_equal(gradient, kept)


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
