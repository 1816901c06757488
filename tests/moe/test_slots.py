"""Buffers of static shape: sizes as published, filled in order, nothing lost and nothing twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchjax.config import MoEConfig, UserError
from switchjax.moe.slots import capacity_of, expert_capacity, fill_slots
from tests.moe.examples import CASES, Case, Choices, fill_one_by_one, random_choices

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
