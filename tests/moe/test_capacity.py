"""Buffers have published sizes and fill up in the order of each policy; nothing is lost and nothing appears twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchjax.config import MoEConfig, UserError
from switchjax.moe.capacity import capacity_of, expert_capacity, fill_slots, gates_of_slots
from switchjax.moe.routing import Tokens
from tests.moe.examples import CASES, Case, Choices, fill_one_by_one, random_choices
from tests.moe.routers.examples import chosen_experts, compiled, random_tokens, random_weights, route, router_config

# One compilation a case; hypothesis then varies the values only.
_fill = jax.jit(fill_slots, static_argnums=(2, 3))


def taken_of(choices: Choices) -> np.ndarray:
    return np.broadcast_to(choices.token_mask[..., None], choices.expert_index.shape)


def fill(choices: Choices, case: Case) -> tuple[np.ndarray, np.ndarray]:
    slot_choice, choice_slot = _fill(
        jnp.asarray(choices.expert_index), jnp.asarray(taken_of(choices)), case.experts, case.capacity
    )
    return np.asarray(slot_choice), np.asarray(choice_slot)


@pytest.mark.parametrize(
    ("arguments", "capacity"),
    [
        ((512, 8, 1, 1.25, 4), 80),  # Switch-Base-8 in training: 1.25 * 512 / 8
        ((512, 128, 1, 1.25, 4), 5),  # Switch-Base-128
        ((512, 256, 1, 1.25, 4), 4),  # the minimum: 2.5 would be 2
        ((512, 2048, 1, 1.0, 2), 2),  # Switch-C
        ((1024, 32, 2, 1.05, 1), 67),  # V-MoE, K = 2: 67.2 rounds down
        ((512, 8, 2, 1.25, 4), 160),  # a second choice doubles it
        ((16, 4, 1, 100.0, 4), 16),  # more than S could never fill
        ((3, 8, 1, 1.0, 4), 3),  # not even by the minimum
    ],
)
def test_expert_capacity_is_the_papers_formula(arguments: tuple[int, int, int, float, int], capacity: int) -> None:
    assert expert_capacity(*arguments) == capacity


@pytest.mark.parametrize(
    ("fields", "training", "capacity"),
    [
        ({}, True, 80),
        ({}, False, 128),
        ({"expert_capacity": 7}, True, 7),  # whatever the factors say
        ({"expert_capacity": 7}, False, 7),
        ({"expert_capacity": 600}, True, 512),  # no more than the group
        ({"expert_capacity": 7, "dropless": True}, True, 512),
    ],
)
def test_capacity_is_of_the_factor_a_number_or_the_group(fields: dict, training: bool, capacity: int) -> None:
    assert capacity_of(MoEConfig(**fields), 8, 512, training) == capacity


@pytest.mark.parametrize(("factor", "minimum"), [(0.0, 4), (-1.0, 4), (1.25, 0)])
def test_a_capacity_of_nothing_is_refused(factor: float, minimum: int) -> None:
    with pytest.raises(UserError, match="capacity"):
        expert_capacity(512, 8, 1, factor, minimum)


@pytest.mark.parametrize("name", CASES)
@given(
    seed=st.integers(0, 2**32 - 1),
    popularity=st.sampled_from([0.0, 0.5, 50.0]),
    padding=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_slots_are_filled_as_by_a_loop_over_tokens(name: str, seed: int, popularity: float, padding: float) -> None:
    case = CASES[name]
    choices = random_choices(case, seed, popularity, padding)
    slot_choice, choice_slot = fill(choices, case)

    expected_choice = np.full((case.groups, case.experts, case.capacity), case.selected * case.tokens)
    expected_slot = np.full((case.groups, case.tokens, case.selected), case.experts * case.capacity)
    for (group, token, k), (expert, position) in fill_one_by_one(choices, case).items():
        expected_choice[group, expert, position] = k * case.tokens + token
        expected_slot[group, token, k] = expert * case.capacity + position
    np.testing.assert_array_equal(slot_choice, expected_choice)
    np.testing.assert_array_equal(choice_slot, expected_slot)


@pytest.mark.parametrize("name", CASES)
def test_positions_are_dense_and_no_choice_has_two_slots(name: str) -> None:
    case = CASES[name]
    choices = random_choices(case, seed=1)
    slot_choice, choice_slot = fill(choices, case)
    nothing, nowhere = case.selected * case.tokens, case.experts * case.capacity
    filled = slot_choice != nothing
    assert np.all(filled[..., 1:] <= filled[..., :-1]), "an empty slot stands before a filled one"
    for group in range(case.groups):
        used = slot_choice[group][filled[group]]
        assert len(set(used)) == len(used)
        slots = choice_slot[group].T.reshape(-1)
        np.testing.assert_array_equal(slots[used], np.flatnonzero(filled[group]))
        # What found no slot is either padding, or its expert is full.
        dropped = (slots == nowhere) & np.tile(choices.token_mask[group], case.selected)
        experts = choices.expert_index[group].T.reshape(-1)
        assert all(filled[group, expert].all() for expert in experts[dropped])
        assert len(used) + dropped.sum() == choices.token_mask[group].sum() * case.selected


def test_every_choice_has_a_slot_when_capacity_is_the_group() -> None:
    case = Case(tokens=12, experts=4, selected=2, capacity=12)
    _, choice_slot = fill(random_choices(case, seed=0, popularity=50.0, padding=0.0), case)
    assert np.all(choice_slot < case.experts * case.capacity)


def test_padding_takes_no_slot_from_the_tokens_after_it() -> None:
    case = Case(tokens=4, experts=1, selected=1, capacity=2, groups=1)
    nothing = np.zeros((1, 4, 1), np.int32)
    mask = np.array([[False, True, False, True]])
    slot_choice, choice_slot = fill(Choices(nothing, nothing, nothing, mask), case)
    assert slot_choice.tolist() == [[[1, 3]]]
    assert choice_slot[0, :, 0].tolist() == [2, 0, 2, 1]


def test_all_first_choices_come_before_any_second_one() -> None:
    # Both tokens want both experts; token 1's first choice beats token 0's second.
    case = Case(tokens=2, experts=2, selected=2, capacity=1, groups=1)
    expert_index = np.array([[[0, 1], [1, 0]]], np.int32)
    mask = np.ones((1, 2), bool)
    slot_choice, _ = fill(Choices(expert_index, expert_index, expert_index, mask), case)
    assert slot_choice.tolist() == [[[0], [1]]]


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


def tokens_with_probs(probs: np.ndarray, capacity: int, training: bool = False) -> tuple[Tokens, dict[str, jax.Array]]:
    """Tokens [S, E] and router weights that result in these probabilities."""
    x = jnp.asarray(np.log(probs), jnp.float32)[None]
    keys = jax.random.split(jax.random.key(0), 1) if training else None
    tokens = Tokens(x, jnp.ones(x.shape[:2], bool), capacity, keys=keys)
    return tokens, {"logits": jnp.eye(x.shape[-1])}


CROWDED = np.array([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.5, 0.4, 0.1], [0.8, 0.15, 0.05]])


def experts_of(config: MoEConfig, probs: np.ndarray, capacity: int, training: bool = False) -> list:
    tokens, weights = tokens_with_probs(probs, capacity, training)
    return chosen_experts(compiled(config)(weights, tokens))[0].tolist()


def switch(**changes: object) -> MoEConfig:
    return router_config("switch", num_experts=3, **changes)


def test_first_come_first_served() -> None:
    assert experts_of(switch(), CROWDED, capacity=2) == [[0], [0], [3], [3]]


def test_batch_prioritized_serves_the_highest_gates_first() -> None:
    assert experts_of(switch(fill_order="batch_prioritized"), CROWDED, capacity=2) == [[3], [0], [3], [0]]


def test_batch_prioritized_takes_all_first_choices_before_any_second() -> None:
    config = router_config("top_k", num_experts=3, fill_order="batch_prioritized", options={"normalize_gates": False})
    # Both want both of two experts: the second token is surer, but the first one's first choice precedes its second.
    probs = np.array([[0.3, 0.6, 0.1], [0.8, 0.15, 0.05]])
    assert experts_of(config, probs, capacity=1) == [[1, 3], [0, 3]]


def test_token_by_token_serves_both_choices_of_a_token_before_the_next_token() -> None:
    probs = np.array([[0.3, 0.6, 0.1], [0.8, 0.15, 0.05]])
    config = router_config("top_k", num_experts=3, fill_order="token_by_token")
    assert experts_of(config, probs, capacity=1) == [[1, 0], [3, 3]]
    first_come = dataclasses.replace(config, fill_order="first_come")
    assert experts_of(first_come, probs, capacity=1) == [[1, 3], [0, 3]]


def test_random_order_is_fair_in_training_and_first_come_in_evaluation() -> None:
    config = switch(fill_order="random")
    assert experts_of(config, CROWDED, capacity=2) == [[0], [0], [3], [3]]
    copies = 2000
    tokens, weights = tokens_with_probs(CROWDED, capacity=2)
    many = Tokens(
        jnp.repeat(tokens.x, copies, axis=0),
        jnp.ones((copies, 4), bool),
        2,
        keys=jax.random.split(jax.random.key(1), copies),
    )
    kept = chosen_experts(compiled(config)(weights, many))[..., 0] == 0
    np.testing.assert_array_equal(kept.sum(axis=1), 2)
    np.testing.assert_allclose(kept.mean(axis=0), 0.5, atol=5 * 0.5 / np.sqrt(copies))  # 5 standard errors


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (0, [[0], [3], [3], [3]]),
        (1, [[0], [2], [1], [3]]),  # the second and third go to their second best; the fourth finds 1 full
        (2, [[0], [2], [1], [3]]),  # and its third best full too
    ],
)
def test_no_token_left_behind_sends_on_to_the_next_best(rounds: int, expected: list) -> None:
    config = switch(no_token_left_behind=rounds)
    assert experts_of(config, CROWDED, capacity=1) == expected


def test_no_token_left_behind_leaves_none_while_there_is_room_and_gates_are_those_of_the_last_expert() -> None:
    config, tokens = router_config("switch", no_token_left_behind=3), random_tokens(tokens=16, capacity=4, padding=0.2)
    weights = {"logits": random_weights(config)["logits"].at[:, 0].add(2.0)}
    routing = route(config, tokens, weights)
    np.testing.assert_array_equal(routing.metrics.dispatched, routing.metrics.routed)
    probs = np.asarray(jax.nn.softmax(tokens.x @ weights["logits"]))
    slot_token, gate = np.asarray(routing.slot_token), np.asarray(routing.slot_gate)
    for group, expert, slot in zip(*np.nonzero(slot_token < 16), strict=True):
        token = slot_token[group, expert, slot]
        np.testing.assert_allclose(gate[group, expert, slot], probs[group, token, expert], rtol=1e-5)
    # The load counts what was wanted, not what was had.
    wanted = np.asarray(route(dataclasses.replace(config, no_token_left_behind=0), tokens, weights).metrics.expert_load)
    np.testing.assert_array_equal(routing.metrics.expert_load, wanted)


@pytest.mark.parametrize("rounds", [1, 4])
def test_tokens_sent_on_keep_their_experts_distinct(rounds: int) -> None:
    config = router_config("top_k", num_experts=4, no_token_left_behind=rounds)
    tokens = random_tokens(groups=4, tokens=32, capacity=12)
    routing = route(config, tokens)
    experts = chosen_experts(routing)
    both = np.all(experts < 4, axis=-1)
    assert np.all(experts[both][:, 0] != experts[both][:, 1])
    dropped = [np.asarray(r.metrics.dispatched).sum() for r in (route(router_config("top_k"), tokens), routing)]
    assert dropped[1] > dropped[0]
