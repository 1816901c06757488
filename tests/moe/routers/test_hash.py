"""Hash routing: the table gives the expert; tables are random, balanced or clustered."""

import dataclasses
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import UserError
from switchjax.moe.routers.hash import HASH, HashOptions, balanced_table, clustered_table, hash_router, random_table
from switchjax.moe.routing import RouterSizes
from tests.moe.routers.examples import VOCAB, chosen_experts, random_tokens, random_weights, route, router_config


class TestRouting:
    @pytest.mark.parametrize("training", [False, True])
    def test_a_token_goes_where_the_table_sends_its_id_with_gate_1(self, training: bool) -> None:
        config, tokens = router_config("hash"), random_tokens(padding=0.3, training=training)
        routing = route(config, tokens)
        expected = np.asarray(random_weights(config)["table"])[np.asarray(tokens.ids)]
        expected = np.where(tokens.mask, expected, config.num_experts)
        np.testing.assert_array_equal(chosen_experts(routing)[..., 0], expected)
        np.testing.assert_array_equal(np.asarray(routing.slot_gate), np.asarray(routing.slot_token) < 16)

    def test_what_the_token_is_besides_plays_no_part(self) -> None:
        config, tokens = router_config("hash"), random_tokens()
        other = dataclasses.replace(tokens, x=-tokens.x)
        np.testing.assert_array_equal(route(config, other).token_slot, route(config, tokens).token_slot)

    def test_load_balance_loss_measures_the_tables_balance(self) -> None:
        tokens = dataclasses.replace(random_tokens(groups=1, tokens=8), ids=jnp.arange(8)[None])
        for experts, expected in (([0] * 8, 4.0), ([0, 0, 1, 1, 2, 2, 3, 3], 1.0), ([0, 0, 0, 0, 1, 1, 1, 1], 2.0)):
            routing = route(router_config("hash"), tokens, {"table": jnp.asarray(experts, jnp.float32)})
            np.testing.assert_allclose(routing.losses["load_balance_loss"] / 8, expected, rtol=1e-6)

    def test_the_table_is_frozen_and_exact(self) -> None:
        weight = hash_router(RouterSizes(6, 2**20, vocab_size=VOCAB), HashOptions(), jax.random.key(0))["table"]
        assert not weight.trained
        assert HASH.next_state is None
        np.testing.assert_array_equal(weight.value, random_table(VOCAB, 2**20, jax.random.key(0)))

    def test_without_ids_there_is_nothing_to_go_by(self) -> None:
        with pytest.raises(UserError, match="token ids"):
            route(router_config("hash"), dataclasses.replace(random_tokens(), ids=None))
        with pytest.raises(UserError, match="vocabulary"):
            hash_router(RouterSizes(6, 4), HashOptions(), jax.random.key(0))


class TestTables:
    def test_random_experts_are_about_equally_frequent(self) -> None:
        table = random_table(8000, 8, jax.random.key(0))
        counts = np.bincount(table, minlength=8)
        assert len(counts) == 8
        np.testing.assert_allclose(counts, 1000, atol=5 * np.sqrt(1000 * 7 / 8))  # 5 standard errors

    @hypothesis.given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
    def test_a_balanced_tables_loads_lie_within_the_largest_count(self, counts: list[int], experts: int) -> None:
        table = balanced_table(np.array(counts), experts)
        assert table.shape == (len(counts),)
        assert set(table) <= set(range(experts))
        loads = np.bincount(table, counts, experts)
        assert loads.max() - loads.min() <= max(counts)

    def test_a_balanced_table_is_greedy_as_a_loop_has_it(self) -> None:
        counts = np.random.default_rng(0).zipf(1.3, size=500).clip(max=10**6)
        loads, expected = [0] * 7, {}
        for token in sorted(range(500), key=lambda token: -counts[token]):
            expected[token] = loads.index(min(loads))
            loads[expected[token]] += int(counts[token])
        np.testing.assert_array_equal(balanced_table(counts, 7), [expected[token] for token in range(500)])

    def test_ids_never_seen_are_dealt_evenly(self) -> None:
        table = balanced_table(np.array([9, 0, 0, 0, 0, 5, 0, 0, 0, 0]), 4)
        assert set(Counter(table[[1, 2, 3, 4, 6, 7, 8, 9]].tolist()).values()) == {2}

    def test_clusters_are_stable_ids_lie_nearest_to_their_own_mean(self) -> None:
        rng = np.random.default_rng(0)
        vectors = (rng.normal(size=(6, 1, 5)) * 2 + rng.normal(size=(6, 50, 5))).reshape(-1, 5).astype(np.float32)
        table = clustered_table(vectors, 4, 3)
        means = np.stack([vectors[table == expert].mean(axis=0) for expert in range(4)])
        distances = np.square(vectors[:, None] - means).sum(axis=-1)
        np.testing.assert_array_equal(table, distances.argmin(axis=1))
        np.testing.assert_array_equal(table, clustered_table(vectors, 4, 3))
        assert np.any(table != clustered_table(vectors, 4, 4))  # the seed draws the first centres

    def test_clusters_of_a_bfloat16_embedding_with_equal_vectors(self) -> None:
        table = clustered_table(np.ones((5, 3), jnp.bfloat16), 2, 0)
        assert len(set(table.tolist())) == 1

    def test_more_clusters_than_ids_are_refused(self) -> None:
        with pytest.raises(UserError, match="3 ids into 4 clusters"):
            clustered_table(np.ones((3, 2)), 4, 0)
