"""The hierarchy of noisy gates against a loop over tokens and groups, and against the flat router."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig, UserError
from switchjax.moe.layer import MoELayer
from switchjax.moe.routers import check_router, router_options
from switchjax.moe.routers.hierarchical import HierarchicalOptions, check_hierarchy, group_level, hierarchical_router
from switchjax.moe.routers.noisy_top_k import MIN_NOISE
from switchjax.moe.routing import RouterSizes
from tests.moe.layers import TinyExpert
from tests.moe.routers.examples import (
    D,
    chosen_experts,
    random_tokens,
    random_weights,
    route,
    router_config,
    token_gates,
)
from tests.moe.routers.noisy_oracle import cv_squared, drawn, gate_one_token, project, softplus

TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def hierarchy(**changes: int) -> MoEConfig:
    """3 groups of 4 experts; a token selects 2 groups, and 2 experts in each."""
    sizes = {"num_experts": 12, "num_selected_experts": 4} | changes
    groups = {name: sizes.pop(name, size) for name, size in (("num_expert_groups", 3), ("num_selected_groups", 2))}
    return router_config("hierarchical", options=groups, **sizes)


def test_all_weights_start_at_0() -> None:
    weights = hierarchical_router(RouterSizes(D, 12), HierarchicalOptions(num_expert_groups=3), jax.random.key(0))
    shapes = {name: weight.value.shape for name, weight in weights.items()}
    assert shapes == {"groups": (D, 3), "groups_noise": (D, 3), "logits": (D, 12), "noise": (D, 12)}
    assert not any(np.any(weight.value) for weight in weights.values())


def test_each_level_draws_its_own_noise() -> None:
    tokens = random_tokens(training=True)
    assert not np.any(drawn(group_level(tokens), (16, 3)) == drawn(tokens, (16, 3)))


@TRAINING
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_selected_groups": 1, "num_selected_experts": 3},
        {"num_selected_groups": 2, "num_selected_experts": 2},
        {"num_selected_groups": 3, "num_selected_experts": 12},
    ],
    ids=["2 x 2", "1 x 3", "2 x 1", "all"],
)
def test_by_hand(sizes: dict[str, int], training: bool) -> None:
    config = hierarchy(**sizes)
    tokens, weights = random_tokens(padding=0.3, training=training), random_weights(config)
    routing = route(config, tokens, weights)
    a, b, selected = 3, 4, router_options(config).num_selected_groups
    logits = {name: project(tokens, weight) for name, weight in weights.items()}
    std = {name: np.maximum(softplus(logits[name]), MIN_NOISE) for name in ("groups_noise", "noise")}
    group_noise = drawn(group_level(tokens), (16, a))
    noise = drawn(tokens, (16 * a, b)).reshape(2, 16, a, b)
    for group in range(2):
        importance, gates = np.zeros((a, b)), np.zeros((16, a, b))
        group_load, load_within, sent = np.zeros(a), np.zeros((a, b)), np.zeros(a)
        real = np.flatnonzero(tokens.mask[group])
        for token in real:
            outer, groups, probability = gate_one_token(
                logits["groups"][group, token],
                std["groups_noise"][group, token],
                group_noise[group, token],
                selected,
            )
            group_load += probability
            for i in groups:
                within = slice(i * b, (i + 1) * b)
                inner, _, probability = gate_one_token(
                    logits["logits"][group, token, within],
                    std["noise"][group, token, within],
                    noise[group, token, i],
                    config.num_selected_experts // selected,
                )
                gates[token, i] = outer[i] * inner
                importance[i] += outer[i] * inner
                load_within[i] += probability
                sent[i] += 1
            order = np.argsort(-gates[token].reshape(-1), kind="stable")[: config.num_selected_experts]
            assert chosen_experts(routing)[group, token].tolist() == order.tolist()
        np.testing.assert_allclose(token_gates(routing)[group], gates.reshape(16, -1), rtol=1e-5, atol=1e-6)
        load = group_load[:, None] * load_within / np.maximum(sent, 1)[:, None]
        expected = [len(real) * cv_squared(importance), len(real) * cv_squared(load)]
        actual = [routing.losses["importance_loss"][group], routing.losses["load_loss"][group]]
        # Variances of float32 sums; where all are equal they cancel to a few units in the last place.
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "training"), [(1, True), (2, False), (2, True)])
def test_a_single_group_is_the_flat_noisy_top_k(k: int, training: bool) -> None:
    tokens = random_tokens(capacity=5, padding=0.3, training=training)
    config = hierarchy(num_expert_groups=1, num_selected_groups=1, num_selected_experts=k)
    # A logit that all experts share takes no part in any choice, but the z-loss sees it.
    weights = random_weights(config) | {"groups": jnp.zeros((D, 1))}
    nested = route(config, tokens, weights)
    flat_config = router_config("noisy_top_k", num_experts=12, num_selected_experts=k)
    flat = route(flat_config, tokens, {name: weights[name] for name in ("logits", "noise")})
    np.testing.assert_array_equal(nested.token_slot, flat.token_slot)
    for name in flat.losses:
        np.testing.assert_allclose(nested.losses[name], flat.losses[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(nested.slot_gate, flat.slot_gate, rtol=1e-6)


def test_a_choice_sent_on_has_the_product_of_the_last_experts_gates() -> None:
    """Gates of experts that were not selected are not 0, so a token that goes to its next best expert is not lost."""
    routing = route(hierarchy(no_token_left_behind=2), random_tokens(capacity=6))
    assert np.all(np.asarray(routing.slot_gate)[np.asarray(routing.slot_token) < 16] > 0)
    before = route(hierarchy(), random_tokens(capacity=6))
    assert np.all(routing.metrics.dispatched > before.metrics.dispatched)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_expert_groups": 5}, r"num_experts=12 do not divide into moe\.options\.num_expert_groups=5"),
        ({"num_selected_groups": 4}, r"moe\.options: num_selected_groups=4 exceeds num_expert_groups=3"),
        ({"num_selected_experts": 3}, r"num_selected_experts=3 do not divide over moe\.options\.num_selected_groups=2"),
        ({"num_selected_experts": 10}, r"selects 5 experts in a group, which has 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int], message: str) -> None:
    config = hierarchy(**sizes)
    with pytest.raises(UserError, match=message):
        check_hierarchy(config, router_options(config))
    with pytest.raises(UserError, match=message):
        check_router(config)
    with pytest.raises(UserError, match=message):  # nor is a layer built
        MoELayer(partial(TinyExpert, 0.0), 8, config, jax.random.key(0))
