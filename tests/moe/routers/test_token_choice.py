"""Routers in which tokens choose, against the papers' rules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.routers.examples import chosen_experts, random_tokens, random_weights, route, router_config, token_gates


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def probabilities(config: object, tokens: object) -> np.ndarray:
    """In float64."""
    weight = np.asarray(random_weights(config)["logits"], np.float64)
    return softmax(np.asarray(tokens.x, np.float64) @ weight)


def best(probs: np.ndarray, selected: int) -> np.ndarray:
    return np.argsort(-probs, axis=-1, kind="stable")[..., :selected]


class TestSwitch:
    def test_each_token_goes_to_its_argmax_with_that_probability_as_gate(self) -> None:
        config, tokens = router_config("switch"), random_tokens()
        probs = probabilities(config, tokens)
        routing = route(config, tokens)
        np.testing.assert_array_equal(chosen_experts(routing), best(probs, 1))
        # never renormalised to 1
        np.testing.assert_allclose(token_gates(routing).sum(axis=-1), probs.max(axis=-1), rtol=1e-5)

    def test_equal_probabilities_go_to_the_first_expert(self) -> None:
        config, tokens = router_config("switch"), random_tokens(groups=1, tokens=3, capacity=3)
        routing = route(config, tokens, {"logits": jnp.zeros_like(random_weights(config)["logits"])})
        assert routing.slot_token[0].tolist() == [[0, 1, 2], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
        np.testing.assert_array_equal(routing.slot_gate[0, 0], 0.25)


class TestTopK:
    @pytest.mark.parametrize("selected", [1, 2, 4])
    def test_raw_gates_are_the_probabilities(self, selected: int) -> None:
        config = router_config("top_k", num_selected_experts=selected, normalize_gates=False)
        tokens = random_tokens()
        probs = probabilities(config, tokens)
        expected = np.zeros_like(probs)
        np.put_along_axis(expected, best(probs, selected), np.sort(probs, axis=-1)[..., ::-1][..., :selected], axis=-1)
        np.testing.assert_allclose(token_gates(route(config, tokens)), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("selected", [2, 4])
    def test_normalised_gates_are_the_softmax_over_the_chosen_logits(self, selected: int) -> None:
        config, tokens = router_config("top_k", num_selected_experts=selected), random_tokens()
        logits = np.asarray(tokens.x, np.float64) @ np.asarray(random_weights(config)["logits"], np.float64)
        index = best(logits, selected)
        expected = np.zeros_like(logits)
        np.put_along_axis(expected, index, softmax(np.take_along_axis(logits, index, axis=-1)), axis=-1)
        np.testing.assert_allclose(token_gates(route(config, tokens)), expected, rtol=1e-5, atol=1e-7)

    def test_a_single_expert_keeps_its_probability(self) -> None:
        tokens = random_tokens()
        top_1, switch = (route(router_config(name, num_selected_experts=1), tokens) for name in ("top_k", "switch"))
        np.testing.assert_array_equal(top_1.slot_gate, switch.slot_gate)


class TestGShard:
    def test_in_evaluation_both_experts_are_kept_with_normalised_gates(self) -> None:
        tokens = random_tokens()
        gshard, top_2 = (route(router_config(name), tokens) for name in ("gshard", "top_k"))
        np.testing.assert_array_equal(gshard.token_slot, top_2.token_slot)
        np.testing.assert_array_equal(gshard.slot_gate, top_2.slot_gate)

    def test_the_second_expert_is_kept_with_probability_twice_its_gate(self) -> None:
        config = router_config("gshard")
        copies = 4000
        tokens = random_tokens(groups=1, tokens=8, capacity=8)
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), tokens)
        repeated = repeated.__class__(
            repeated.x, repeated.mask, 8, repeated.ids, jax.random.split(jax.random.key(0), copies)
        )
        kept = (chosen_experts(route(config, repeated))[..., 1] < config.num_experts).mean(axis=0)
        top_2 = np.sort(probabilities(config, tokens)[0], axis=-1)[:, -2:]
        expected = np.minimum(1, 2 * top_2[:, 0] / top_2.sum(axis=-1))
        np.testing.assert_allclose(kept, expected, atol=5 * 0.5 / np.sqrt(copies))  # 5 standard errors
        assert expected.min() < 0.6

    def test_a_choice_given_up_is_neither_routed_nor_dropped_and_leaves_the_first_gate_alone(self) -> None:
        config, tokens = router_config("gshard"), random_tokens(training=True)
        routing = route(config, tokens)
        given_up = np.sum(chosen_experts(routing) == config.num_experts, axis=(1, 2))
        assert given_up.sum() > 0
        np.testing.assert_array_equal(routing.metrics["routed"], 32 - given_up)
        np.testing.assert_array_equal(routing.metrics["dispatched"], routing.metrics["routed"])
        probs = np.sort(probabilities(config, tokens), axis=-1)
        first = token_gates(routing).max(axis=-1)
        np.testing.assert_allclose(first, probs[..., -1] / probs[..., -2:].sum(axis=-1), rtol=1e-5)

    def test_load_balance_counts_first_choices(self) -> None:
        tokens = random_tokens()
        gshard = route(router_config("gshard"), tokens)
        first = route(router_config("switch"), tokens)
        np.testing.assert_allclose(gshard.losses["load_balance_loss"], first.losses["load_balance_loss"], rtol=1e-6)


class TestStMoe:
    @pytest.mark.parametrize("training", [False, True])
    def test_the_second_expert_is_kept_where_its_gate_exceeds_the_threshold(self, training: bool) -> None:
        config = router_config("st_moe", second_expert_threshold=0.3)
        tokens = random_tokens(tokens=64, capacity=64, training=training)
        top_2 = np.sort(probabilities(config, tokens), axis=-1)[..., -2:]
        expected = top_2[..., 0] / top_2.sum(axis=-1) > 0.3
        assert 0.2 < expected.mean() < 0.8
        kept = chosen_experts(route(config, tokens))[..., 1] < config.num_experts
        np.testing.assert_array_equal(kept, expected)
