"""GShard's top-2 against the paper's algorithm by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.moe.routers.examples import chosen_experts, probabilities, random_tokens, route, router_config, token_gates


def test_in_evaluation_both_experts_are_kept_with_normalised_gates() -> None:
    tokens = random_tokens()
    gshard, top_2 = (route(router_config(name), tokens) for name in ("gshard", "top_k"))
    np.testing.assert_array_equal(gshard.token_slot, top_2.token_slot)
    np.testing.assert_array_equal(gshard.slot_gate, top_2.slot_gate)


def test_the_second_expert_is_kept_with_probability_twice_its_gate() -> None:
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


def test_a_choice_given_up_is_neither_routed_nor_dropped_and_leaves_the_first_gate_alone() -> None:
    config, tokens = router_config("gshard"), random_tokens(training=True)
    routing = route(config, tokens)
    given_up = np.sum(chosen_experts(routing) == config.num_experts, axis=(1, 2))
    assert given_up.sum() > 0
    np.testing.assert_array_equal(routing.metrics.routed, 32 - given_up)
    np.testing.assert_array_equal(routing.metrics.dispatched, routing.metrics.routed)
    probs = np.sort(probabilities(config, tokens), axis=-1)
    first = token_gates(routing).max(axis=-1)
    np.testing.assert_allclose(first, probs[..., -1] / probs[..., -2:].sum(axis=-1), rtol=1e-5)


def test_load_balance_counts_first_choices() -> None:
    tokens = random_tokens()
    gshard = route(router_config("gshard"), tokens)
    first = route(router_config("switch"), tokens)
    np.testing.assert_allclose(gshard.losses["load_balance_loss"], first.losses["load_balance_loss"], rtol=1e-6)
