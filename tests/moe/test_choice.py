"""Policies of token choice: who comes first, who is sent on, what is drawn at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig
from switchjax.moe.choice import select_experts
from switchjax.moe.routing import Tokens
from tests.moe.routers.examples import chosen_experts, compiled, random_tokens, random_weights, route, router_config

PROBS_TO_LOGITS = np.eye(4)


def tokens_with_probs(probs: np.ndarray, capacity: int, training: bool = False) -> tuple[Tokens, dict[str, jax.Array]]:
    """Tokens [S, E] and router weights that give them these probabilities."""
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
    config = router_config("top_k", num_experts=3, fill_order="batch_prioritized", normalize_gates=False)
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
    np.testing.assert_array_equal(routing.metrics["dispatched"], routing.metrics["routed"])
    probs = np.asarray(jax.nn.softmax(tokens.x @ weights["logits"]))
    slot_token, gate = np.asarray(routing.slot_token), np.asarray(routing.slot_gate)
    for group, expert, slot in zip(*np.nonzero(slot_token < 16), strict=True):
        token = slot_token[group, expert, slot]
        np.testing.assert_allclose(gate[group, expert, slot], probs[group, token, expert], rtol=1e-5)
    # The load counts what was wanted, not what was had.
    wanted = np.asarray(
        route(dataclasses.replace(config, no_token_left_behind=0), tokens, weights).metrics["expert_load"]
    )
    np.testing.assert_array_equal(routing.metrics["expert_load"], wanted)


@pytest.mark.parametrize("rounds", [1, 4])
def test_tokens_sent_on_keep_their_experts_distinct(rounds: int) -> None:
    config = router_config("top_k", num_experts=4, no_token_left_behind=rounds)
    tokens = random_tokens(groups=4, tokens=32, capacity=12)
    routing = route(config, tokens)
    experts = chosen_experts(routing)
    both = np.all(experts < 4, axis=-1)
    assert np.all(experts[both][:, 0] != experts[both][:, 1])
    dropped = [np.asarray(r.metrics["dispatched"]).sum() for r in (route(router_config("top_k"), tokens), routing)]
    assert dropped[1] > dropped[0]


def test_sampled_experts_follow_the_softmax_in_training_only() -> None:
    copies = 8000
    logits = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]]))
    config = switch(sample_experts=True)
    keys = jax.random.split(jax.random.key(2), copies)
    tokens = Tokens(jnp.zeros((copies, 1, 1)), jnp.ones((copies, 1), bool), 1, keys=keys)
    drawn = np.asarray(select_experts(tokens, config, jnp.repeat(logits, copies, axis=0)))
    np.testing.assert_allclose(
        np.bincount(drawn.reshape(-1)) / copies, [0.5, 0.3, 0.2], atol=5 * 0.5 / np.sqrt(copies)
    )  # 5 standard errors
    quiet = dataclasses.replace(tokens, keys=None)
    assert np.all(np.asarray(select_experts(quiet, config, jnp.repeat(logits, copies, axis=0))) == 0)
