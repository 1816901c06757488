"""What holds for every router, also for one from outside the package."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig
from switchjax.moe.choice import token_choice
from switchjax.moe.layer import noncausal_because
from switchjax.moe.losses import summarize
from switchjax.moe.routers import ROUTERS
from switchjax.moe.routing import Router, Routing, Tokens, Weights, project
from tests.moe.layers import make_inputs, make_layer, run_with_gradients
from tests.moe.routers.examples import (
    D,
    chosen_experts,
    compiled,
    random_tokens,
    random_weights,
    route,
    router_config,
)

TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
EVERY = pytest.mark.parametrize("name", ROUTERS)


def check_slots(routing: Routing, tokens: Tokens) -> None:
    """Slots hold distinct real tokens, and `token_slot` is the inverse of `slot_token`."""
    groups, experts, capacity = routing.slot_token.shape
    slot_token, gate = np.asarray(routing.slot_token), np.asarray(routing.slot_gate)
    filled = slot_token < routing.num_tokens
    assert np.all(gate[~filled] == 0)
    assert np.all(np.isfinite(gate))
    for group in range(groups):
        for expert in range(experts):
            held = slot_token[group, expert][filled[group, expert]]
            assert len(set(held)) == len(held)
            assert np.all(np.asarray(tokens.mask)[group, held])
        if routing.token_slot is not None:
            slots = np.asarray(routing.token_slot)[group]
            inverse = {int(slot): token for token, row in enumerate(slots) for slot in row if slot < experts * capacity}
            flat = slot_token[group].reshape(-1)
            assert inverse == {slot: int(flat[slot]) for slot in np.flatnonzero(flat < routing.num_tokens)}


@TRAINING
@EVERY
@pytest.mark.parametrize(("capacity", "padding"), [(16, 0.0), (3, 0.3), (1, 1.0)])
def test_slots_are_consistent_and_metrics_add_up(name: str, capacity: int, padding: float, training: bool) -> None:
    tokens = random_tokens(capacity=capacity, padding=padding, training=training)
    routing = route(router_config(name), tokens)
    check_slots(routing, tokens)
    metrics = jax.tree.map(np.asarray, routing.metrics)
    np.testing.assert_array_equal(metrics["tokens"], np.asarray(tokens.mask).sum(axis=1))
    assert np.all(metrics["dispatched"] <= metrics["routed"])
    assert np.all(metrics["routed"] <= metrics["tokens"] * router_config(name).num_selected_experts)
    if routing.token_slot is not None:
        filled = (np.asarray(routing.slot_token) < 16).sum(axis=(1, 2))
        np.testing.assert_array_equal(metrics["dispatched"], filled)
        np.testing.assert_array_equal(metrics["expert_load"].sum(axis=1), metrics["routed"])
    for value in jax.tree.leaves((routing.losses, routing.token_values, summarize(routing.losses | routing.metrics))):
        assert np.all(np.isfinite(value))


@TRAINING
@EVERY
def test_what_padding_holds_changes_nothing(name: str, training: bool) -> None:
    tokens = random_tokens(capacity=3, padding=0.3, training=training)
    other = dataclasses.replace(
        tokens,
        x=jnp.where(tokens.mask[..., None], tokens.x, -7.0),
        ids=jnp.where(tokens.mask, tokens.ids, 0),
    )
    config = router_config(name)
    for actual, expected in zip(*(jax.tree.leaves(route(config, t)) for t in (other, tokens)), strict=True):
        np.testing.assert_array_equal(actual, expected)


@EVERY
def test_every_choice_is_kept_when_capacity_is_the_group(name: str) -> None:
    routing = route(router_config(name), random_tokens(padding=0.3))
    np.testing.assert_array_equal(routing.metrics["dispatched"], routing.metrics["routed"])


@EVERY
def test_load_balance_loss_is_1_at_perfect_balance(name: str) -> None:
    config = router_config(name)
    # Token s of 8 prefers expert s % 4, then the next: each expert is every rank as often as the others.
    logits = np.array([np.roll([3.0, 2.0, 1.0, 0.0], s) for s in range(8)], np.float32)
    tokens = Tokens(
        jnp.asarray(np.pad(logits, ((0, 0), (0, D - 4))))[None],
        jnp.ones((1, 8), bool),
        8,
        ids=jnp.arange(8)[None],
    )
    weights = jax.tree.map(jnp.zeros_like, random_weights(config)) | {"logits": jnp.eye(D, 4)}
    if "table" in weights:
        weights["table"] = jnp.arange(weights["table"].shape[0], dtype=jnp.float32) % 4
    weights = {weight: weights[weight] for weight in random_weights(config)}
    summary = summarize({k: v[0] for k, v in (lambda r: r.losses | r.metrics)(route(config, tokens, weights)).items()})
    np.testing.assert_allclose(summary["load_balance_loss"], 1, rtol=1e-5)
    np.testing.assert_allclose(summary["expert_load"], 0.25)


@TRAINING
@pytest.mark.parametrize("name", [name for name in ROUTERS if not ROUTERS[name].noncausal])
def test_losses_count_choices_before_capacity(name: str, training: bool) -> None:
    few, many = (route(router_config(name), random_tokens(capacity=c, training=training)) for c in (1, 16))
    jax.tree.map(np.testing.assert_array_equal, few.losses, many.losses)
    if name == "base" and training:  # its capacity is its own
        np.testing.assert_array_equal(few.metrics["dispatched"], many.metrics["dispatched"])
    else:
        assert np.all(few.metrics["dispatched"] < many.metrics["dispatched"])


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "hash"])  # which has nothing to train
def test_the_router_gets_the_models_gradient_through_the_gates(name: str) -> None:
    config, tokens = router_config(name), random_tokens(training=True)
    weights = random_weights(config)
    trained = {"logits": weights["logits"]}

    def total(trained: Weights) -> jax.Array:
        gate = compiled(config)(weights | dict(trained), tokens).slot_gate
        return jnp.sum(jnp.sin(jnp.arange(gate.size).reshape(gate.shape)) * gate)

    gradient = np.asarray(jax.jit(jax.grad(total))(trained)["logits"])
    assert np.all(np.isfinite(gradient))
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("name", [name for name in ROUTERS if not ROUTERS[name].noncausal])
def test_evaluation_is_deterministic_and_looks_at_no_later_token_unless_it_says_so(name: str) -> None:
    config = router_config(name, fill_order="token_by_token")
    assert noncausal_because(config) is None
    tokens, weights = random_tokens(capacity=6), random_weights(config)
    other = random_tokens(capacity=6, seed=1)
    mixed = dataclasses.replace(
        tokens,
        x=jnp.concatenate([tokens.x[:, :9], other.x[:, 9:]], axis=1),
        ids=jnp.concatenate([tokens.ids[:, :9], other.ids[:, 9:]], axis=1),
    )
    routing, changed = (route(config, t, weights) for t in (tokens, mixed))
    np.testing.assert_array_equal(chosen_experts(routing)[:, :9], chosen_experts(changed)[:, :9])
    assert np.any(chosen_experts(routing)[:, 9:] != chosen_experts(changed)[:, 9:])


def test_second_choices_under_first_come_do_look_at_later_tokens() -> None:
    """The reason that the guard gives is true."""
    config = router_config("top_k")
    assert "second choice" in str(noncausal_because(config))
    seen = False
    for seed in range(5):
        tokens, other = random_tokens(capacity=5, seed=seed), random_tokens(capacity=5, seed=seed + 10)
        mixed = dataclasses.replace(tokens, x=jnp.concatenate([tokens.x[:, :9], other.x[:, 9:]], axis=1))
        before, after = (chosen_experts(route(config, t))[:, :9] for t in (tokens, mixed))
        seen |= bool(np.any(before != after))
    assert seen


def route_by_first_feature(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """A router of one's own: the expert of the highest logit among two."""
    logits = project(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    index = (logits[..., 1:2] > logits[..., :1]).astype(jnp.int32)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=probs, expert_index=index)


def test_a_router_from_outside_the_package_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "of one's own", Router(route_by_first_feature))
    layer = make_layer(router="of one's own", num_experts=4)
    x, mask = make_inputs()
    (_, (y, sums)), (gradient, _) = run_with_gradients(layer, x, mask, jax.random.key(0))
    assert np.any(np.asarray(y) != 0)
    assert np.all(np.asarray(sums["expert_load"])[2:] == 0)
    assert np.any(np.asarray(gradient.router["logits"][...]) != 0)
