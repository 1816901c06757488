"""Properties of every router, including one from outside the package."""

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import parse_slice
from switchjax.config import Config, MoEConfig, UserError
from switchjax.models.families import build
from switchjax.models.parameters import count_trained
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import router_logits, select_experts
from switchjax.moe.layer import MoELayer
from switchjax.moe.losses import count_choices
from switchjax.moe.routers import ROUTERS, check_router, loss_weights, noncausal_because, router_options
from switchjax.moe.routing import (
    BALANCE,
    NoOptions,
    Router,
    RouterSizes,
    Routing,
    Tokens,
    Weight,
    Weights,
    linear_router,
)
from switchjax.planning.plan import plan_step
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.metrics import read_metrics
from switchjax.training.run import train
from tests.moe.layers import TinyExpert, make_inputs, make_layer, run, run_with_gradients
from tests.moe.reports import contents_of, means_of, sums_of
from tests.moe.routers.examples import (
    VOCAB,
    D,
    chosen_experts,
    compiled,
    random_tokens,
    random_weights,
    route,
    router_config,
)
from tests.tiny import changed

TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
SIZES = RouterSizes(D, 4, VOCAB)
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
    metrics = jax.tree.map(np.asarray, sums_of(routing))
    np.testing.assert_array_equal(metrics["tokens"], np.asarray(tokens.mask).sum(axis=1))
    assert np.all(metrics["dispatched"] <= metrics["routed"])
    assert np.all(metrics["routed"] <= metrics["tokens"] * router_config(name).num_selected_experts)
    if routing.token_slot is not None:
        filled = (np.asarray(routing.slot_token) < 16).sum(axis=(1, 2))
        np.testing.assert_array_equal(metrics["dispatched"], filled)
        np.testing.assert_array_equal(metrics["expert_load"].sum(axis=1), metrics["routed"])
    for value in [*contents_of(routing).values(), *means_of(routing).values()]:
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
    np.testing.assert_array_equal(routing.metrics.dispatched, routing.metrics.routed)


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
    means = means_of(route(config, tokens, weights))
    np.testing.assert_allclose(means["load_balance_loss"], 1, rtol=1e-5)
    np.testing.assert_allclose(means["expert_load"], 0.25)


@TRAINING
@pytest.mark.parametrize("name", [name for name in ROUTERS if not ROUTERS[name].noncausal])
def test_losses_count_choices_before_capacity(name: str, training: bool) -> None:
    few, many = (route(router_config(name), random_tokens(capacity=c, training=training)) for c in (1, 16))
    jax.tree.map(np.testing.assert_array_equal, few.losses, many.losses)
    if name == "base" and training:  # its capacity is its own
        np.testing.assert_array_equal(few.metrics.dispatched, many.metrics.dispatched)
    else:
        assert np.all(few.metrics.dispatched < many.metrics.dispatched)


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


@TRAINING
@EVERY
def test_a_router_declares_exactly_the_losses_that_it_returns_and_all_are_0_for_padding(
    name: str, training: bool
) -> None:
    router, config = ROUTERS[name], router_config(name)
    routing = route(config, random_tokens(padding=1.0, training=training))
    returned = dict(routing.losses)
    if router.reward_losses is not None:
        values = {value: by_group[None] for value, by_group in routing.token_values.items()}
        rewarded = router.reward_losses(values, jnp.ones((2, 16)), jnp.zeros((2, 16), bool))
        assert not rewarded.keys() & returned.keys()
        returned |= rewarded
    else:
        assert not routing.token_values, "what no loss asks for"
    assert returned.keys() == router.losses.keys()
    assert routing.losses.keys() >= BALANCE.keys()
    for loss in returned.values():
        np.testing.assert_array_equal(loss, 0)


@EVERY
def test_state_is_what_a_router_moves_and_nothing_else_is_reported_for_it(name: str) -> None:
    router, config = ROUTERS[name], router_config(name)
    routing = route(config, random_tokens(training=True))
    assert bool(routing.state_sums) == (router.next_state is not None)
    if router.next_state is not None:
        weights = random_weights(config)
        sums = jax.tree.map(lambda values: jnp.sum(values, axis=0), routing.state_sums)
        moved = router.next_state(weights, sums, router_options(config))
        made = router.weights(SIZES, router_options(config), jax.random.key(0))
        assert moved.keys() <= {weight for weight in made if not made[weight].trained}
        for weight, value in moved.items():
            assert value.shape == weights[weight].shape
            assert value.dtype == weights[weight].dtype


WITH_OPTIONS = [(name, field.name) for name, router in ROUTERS.items() for field in dataclasses.fields(router.options)]


def refused(config: MoEConfig) -> str:
    """The one message with which both the router's check and a layer refuse the section."""
    with pytest.raises(UserError) as of_check:
        check_router(config)
    with pytest.raises(UserError) as of_layer:
        MoELayer(partial(TinyExpert, 0.0), D, config, jax.random.key(0))
    message = str(of_check.value)
    assert str(of_layer.value) == message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "option"), WITH_OPTIONS)
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(name: str, option: str) -> None:
    message = refused(router_config(name, options={option + "s": 1}))
    assert message == f"unknown config key 'moe.options.{option}s' (did you mean '{option}'?)"


@pytest.mark.parametrize(("name", "option"), WITH_OPTIONS)
def test_an_option_of_the_wrong_type_is_refused(name: str, option: str) -> None:
    default = getattr(ROUTERS[name].options(), option)
    for wrong in (None, [default], 3 if isinstance(default, str | bool) else "3", 1.5 if type(default) is int else {}):
        message = refused(router_config(name, options={option: wrong}))
        kind = type(default).__name__
        wanted = tuple(wrong) if isinstance(wrong, list) else wrong
        assert message == f"moe.options.{option} must be of type {kind}, got {wanted!r}"


@EVERY
def test_an_option_of_another_router_is_refused(name: str) -> None:
    options = [field.name for field in dataclasses.fields(ROUTERS[name].options)]
    other = next(option for _, option in WITH_OPTIONS if option not in options)
    message = refused(router_config(name, options={other: 1}))
    assert message.startswith(f"unknown config key 'moe.options.{other}' (")
    assert all(option in message for option in options) or "did you mean" in message


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("st_moe", "second_expert_threshold", 1.0),
        ("st_moe", "second_expert_threshold", -0.1),
        ("hierarchical", "num_expert_groups", 0),
        ("hierarchical", "num_selected_groups", 0),
        ("sigmoid", "bias_update_rate", 0.0),
        ("hash", "hash_table", "balance"),
        ("base", "auction_rounds", 0),
        ("sinkhorn", "sinkhorn_iterations", 0),
    ],
)
def test_an_option_out_of_range_is_refused(name: str, option: str, value: object) -> None:
    assert f"moe.options.{option}" in refused(router_config(name, options={option: value}))


@EVERY
def test_options_have_defaults_and_are_taken_from_the_section(name: str) -> None:
    assert router_options(router_config(name)) == ROUTERS[name].options()
    for field in dataclasses.fields(ROUTERS[name].options):
        default = field.default
        assert isinstance(default, bool | int | float | str)
        if isinstance(default, bool | str):
            other = "balanced" if isinstance(default, str) else not default
        else:
            other = 2 if default == 1 else type(default)(default / 2)
        options = router_options(router_config(name, options={field.name: other}))
        assert options == dataclasses.replace(ROUTERS[name].options(), **{field.name: other})
        assert options != ROUTERS[name].options()


@EVERY
def test_the_weight_of_a_loss_that_the_router_does_not_have_is_refused_with_the_one_that_was_meant(name: str) -> None:
    for loss in ROUTERS[name].losses:
        message = refused(router_config(name, loss_weights={loss.replace("_loss", "_los"): 0.1}))
        expected = f"moe.loss_weights: router {name} has no loss '{loss.replace('_loss', '_los')}'"
        assert message == f"{expected} (did you mean '{loss}'?)"
    message = refused(router_config(name, loss_weights={"average_of_nothing": 0.1}))
    assert message.startswith(f"moe.loss_weights: router {name} has no loss 'average_of_nothing' (")
    assert "load_balance_loss" in message


@EVERY
def test_loss_weights_replace_the_routers_own_one_by_one(name: str) -> None:
    losses = ROUTERS[name].losses
    assert loss_weights(router_config(name)) == losses
    for loss in losses:
        assert loss_weights(router_config(name, loss_weights={loss: 0.125})) == {**losses, loss: 0.125}


def test_a_router_that_does_not_exist_is_refused_with_the_one_that_was_meant() -> None:
    for ask in (router_options, loss_weights, noncausal_because):
        with pytest.raises(UserError, match=r"moe\.router: unknown value 'swich' \(did you mean 'switch'\?\)"):
            ask(MoEConfig(router="swich"))
    assert refused(MoEConfig(router="swich")) == "moe.router: unknown value 'swich' (did you mean 'switch'?)"


def route_by_first_feature(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """A router from outside the package: the expert with the highest of two logits."""
    logits = router_logits(tokens.x, weights["logits"])
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


@pytest.mark.parametrize("declared", [{}, {"load_balance_loss": 0.01}])
@TRAINING
def test_a_router_that_returns_a_loss_without_a_default_weight_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, declared: dict[str, float], training: bool
) -> None:
    name = "forgetful"
    monkeypatch.setitem(ROUTERS, name, Router(route_by_first_feature, losses=declared))
    layer = make_layer(router=name, num_experts=4)
    x, mask = make_inputs(rows=2)
    missing = ", ".join(sorted(BALANCE.keys() - declared.keys()))
    message = rf"(?m)^router forgetful returns {missing} without a default weight: name it in Router\.losses$"
    with pytest.raises(UserError, match=message):
        run(layer, x, mask, jax.random.key(0) if training else None)


# A router from outside the package, with an option, a weight, a loss and a state of its own: all that it needs.
@dataclass(frozen=True)
class PricedOptions:
    strength: float = 1.0


def priced_weights(sizes: RouterSizes, options: PricedOptions, key: jax.Array) -> dict[str, Weight]:
    scale = Weight(jnp.ones(sizes.num_experts), (None,))
    price = Weight(jnp.zeros(sizes.num_experts), (None,), trained=False)
    return linear_router(sizes, options, key) | {"scale": scale, "price": price}


def route_priced(weights: Weights, tokens: Tokens, config: MoEConfig, options: PricedOptions) -> Routing:
    """Top-1 by scaled logits less a price, which follows the share of tokens that an expert gets."""
    logits = router_logits(tokens.x, weights["logits"]) * weights["scale"][None, None]
    probs = jax.nn.softmax(logits, axis=-1)
    index = select_experts(tokens, config, logits - options.strength * weights["price"][None, None])
    return token_choice(
        tokens,
        config,
        logits=logits,
        probs=probs,
        gates=probs,
        expert_index=index,
        losses={
            "scale_loss": jnp.sum(tokens.mask, axis=1, dtype=jnp.float32) * jnp.sum(jnp.square(weights["scale"] - 2))
        },
        state_sums={"load": count_choices(index, tokens.mask[..., None], config.num_experts)},
    )


def next_price(weights: Weights, sums: dict[str, jax.Array], options: PricedOptions) -> dict[str, jax.Array]:
    return {"price": 0.9 * weights["price"] + 0.1 * sums["load"] / jnp.maximum(jnp.sum(sums["load"]), 1)}


PRICED = Router(
    route_priced, priced_weights, PricedOptions, losses={**BALANCE, "scale_loss": 0.1}, next_state=next_price
)


@pytest.fixture
def priced(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(ROUTERS, "priced", PRICED)
    return changed(
        tiny,
        moe={"router": "priced", "options": {"strength": 0.5}, "loss_weights": {"scale_loss": 0.2}},
        train={"accumulation_steps": 2, "checkpoint_every": 3},
        data={"batch_size": 48},
        evaluate={"every": 0},
    )


@pytest.mark.slow
def test_a_router_from_outside_trains_is_saved_and_resumes_on_a_mesh(priced: Config, tmp_path: Path) -> None:
    def records(name: str) -> list[dict[str, Any]]:
        timed = ("per_second", "fraction")
        found = read_metrics(tmp_path / name, "train")
        return [{key: value for key, value in row.items() if not key.endswith(timed)} for row in found]

    train(priced, tmp_path / "whole")
    for steps in (3, 6):
        train(changed(priced, train={"steps": steps}), tmp_path / "twice")
    assert records("twice")[3:] == records("whole")[3:]
    first, last = records("whole")[0], records("whole")[-1]
    assert first["scale_loss"] == pytest.approx(4)  # (1 - 2)^2 for each of 4 experts
    assert last["scale_loss"] < first["scale_loss"]
    with closing(Checkpoints(tmp_path / "whole")) as checkpoints:
        assert checkpoints.shapes(6)["model/decoder/1/ff/router/price"] == (4,)
        assert checkpoints.shapes(6)["model/decoder/1/ff/router/scale"] == (4,)


def test_a_router_from_outside_is_accounted_for_and_its_options_are_checked(priced: Config) -> None:
    model = jax.eval_shape(lambda: build(priced, jax.random.key(0)))
    plain = account(changed(priced, moe={"router": "switch", "options": {}, "loss_weights": {}}))
    assert account(priced).total == count_trained(model) == plain.total + 2 * 4  # a scale in one layer a stack
    assert account(priced).parameters["routers"] == plain.parameters["routers"] + 2 * 4
    misspelt = changed(priced, moe={"options": {"strenght": 0.5}})
    with pytest.raises(UserError, match=r"unknown config key 'moe\.options\.strenght' \(did you mean 'strength'\?\)"):
        build(misspelt, jax.random.key(0))


@pytest.mark.slow
def test_a_router_from_outside_is_planned_on_tpus(priced: Config) -> None:
    plan = plan_step(changed(priced, mesh={"data": 1, "expert": 4}), parse_slice("v5e:2x2"))
    assert plan.collectives["all-to-all"].count == 2 * 2 * 4  # MoE layers, micro-batches, 4 a layer
    assert plan.memory_per_device.total < plan.memory_per_device.capacity
