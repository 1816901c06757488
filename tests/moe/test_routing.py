"""The Switch router: argmax, its probability as the gate, noise keyed by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.moe.routing import ROUTERS, Routing, gates_of_slots, jitter, route_switch
from tests.hlo import count_operations
from tests.moe.examples import CASES, fill_one_by_one, random_choices

_route = jax.jit(route_switch, static_argnums=2)


def route(logits: np.ndarray, mask: np.ndarray | None = None, capacity: int = 4) -> Routing:
    mask = np.ones(logits.shape[:2], bool) if mask is None else mask
    return _route(logits.astype(np.float32), mask, capacity)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_switch_sends_each_token_to_its_argmax_with_that_probability_as_gate() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 8, 4))
    routing = route(logits, capacity=8)
    expert, position = np.divmod(np.asarray(routing.token_slot[..., 0]), 8)
    np.testing.assert_array_equal(expert, logits.argmax(axis=-1))
    gates = np.asarray(routing.slot_gate)[np.arange(2)[:, None], expert, position]
    np.testing.assert_allclose(gates, softmax(logits).max(axis=-1), rtol=1e-6)  # never renormalised to 1
    np.testing.assert_array_equal(
        np.asarray(routing.slot_token)[np.arange(2)[:, None], expert, position], np.tile(np.arange(8), (2, 1))
    )


def test_equal_probabilities_go_to_the_first_expert() -> None:
    routing = route(np.zeros((1, 3, 4)), capacity=3)
    assert routing.slot_token[0].tolist() == [[0, 1, 2], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    np.testing.assert_array_equal(routing.slot_gate[0, 0], 0.25)


def test_empty_slots_have_gate_0_and_token_S() -> None:
    mask = np.array([[True, False, True]])
    routing = route(np.array([[[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]]]), mask, capacity=3)
    assert routing.slot_token.tolist() == [[[0, 2, 3], [3, 3, 3]]]
    np.testing.assert_array_equal(np.asarray(routing.slot_gate) > 0, [[[True, True, False], [False] * 3]])


@pytest.mark.parametrize("name", ROUTERS)
def test_the_router_gets_a_gradient_through_the_gates(name: str) -> None:
    logits = np.random.default_rng(1).normal(size=(1, 6, 4)).astype(np.float32)
    mask = jnp.ones((1, 6), bool)
    grad = jax.jit(jax.grad(lambda logits: jnp.sum(ROUTERS[name](logits, mask, 6).slot_gate)))
    gradient = np.asarray(grad(logits))
    probs = softmax(logits.astype(np.float64))
    chosen = np.eye(4)[logits.argmax(axis=-1)]
    best = (probs * chosen).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, best * (chosen - probs), rtol=1e-5, atol=1e-6)  # of p_max by each logit
    assert np.abs(gradient).max() > 0.05


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_needs_no_scatter_in_either_direction(name: str) -> None:
    def loss(logits: jax.Array, mask: jax.Array) -> jax.Array:
        routing = ROUTERS[name](logits, mask, 2)
        return jnp.sum(routing.slot_gate) + jnp.sum(routing.losses["load_balance_loss"])

    compiled = jax.jit(jax.value_and_grad(loss)).lower(np.zeros((2, 6, 4), np.float32), np.ones((2, 6), bool)).compile()
    assert count_operations(compiled)["scatter"] == 0


@pytest.mark.parametrize("name", ROUTERS)
def test_dispatched_and_dropped_add_up_to_routed(name: str) -> None:
    rng = np.random.default_rng(2)
    mask = rng.uniform(size=(3, 16)) > 0.3
    metrics = _route(rng.normal(size=(3, 16, 4)).astype(np.float32), mask, 2).metrics
    np.testing.assert_array_equal(metrics["routed"], mask.sum(axis=1))
    np.testing.assert_array_equal(metrics["dispatched"], np.minimum(metrics["expert_load"], 2).sum(axis=1))
    np.testing.assert_array_equal(metrics["expert_load"].sum(axis=1), metrics["routed"])  # before capacity
    assert np.any(metrics["dispatched"] < metrics["routed"])


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
