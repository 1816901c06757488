"""The train step: the loss by hand, gradients that no division of the batch changes, and every update rule."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, MeshConfig, MoEConfig
from switchjax.data.text import TextData
from switchjax.moe.routers import ROUTERS
from switchjax.moe.routers.token_choice import route_switch
from switchjax.moe.routing import Router, RouterSizes, Routing, Tokens, Weight, Weights, linear_router
from switchjax.parallel.mesh import make_mesh, one_at_a_time
from switchjax.parallel.sharding import named_leaves, place_batch
from switchjax.training.state import TrainState, plan_state
from switchjax.training.step import Metrics, token_losses, train_step
from tests.tiny import changed


def test_token_losses_by_hand() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[1.0, 2.0, 5.0], [1 / 3] * 3]], np.float32))
    targets, mask = jnp.array([[0, 1], [2, 0]]), jnp.array([[True, True], [True, False]])
    nll, z_loss = token_losses(jnp.asarray(logits), targets, mask)
    assert float(nll) == pytest.approx(-np.log(0.5) - np.log(0.8) - np.log(5 / 8), rel=1e-6)
    assert float(z_loss) == pytest.approx(np.log(8.0) ** 2, rel=1e-5)


@pytest.fixture(scope="module")
def batch(tiny: Config) -> dict[str, np.ndarray]:
    return next(TextData.prepare(tiny.data).train_batches())


def take_steps(
    config: Config, batch: dict[str, np.ndarray], count: int, devices: int = 8
) -> tuple[TrainState, Metrics]:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        plan = plan_state(config, mesh)
        state = plan.create()
        step = jax.jit(partial(train_step, config=config, optimizer=plan.optimizer))
        for _ in range(count):
            state, metrics = one_at_a_time(step(state, place_batch(batch, mesh)))
        return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def reference(tiny: Config, batch: dict[str, np.ndarray]) -> tuple[TrainState, Metrics]:
    return take_steps(tiny, batch, 3)


def assert_same(actual: tuple[TrainState, Metrics], expected: tuple[TrainState, Metrics]) -> None:
    """Equal to float32 rounding, which three optimiser steps at unit scale grow to a few 1e-5."""
    for name, value in expected[1].items():
        if name != "gradient_norms":
            np.testing.assert_allclose(actual[1][name], value, rtol=2e-5, atol=1e-5, err_msg=name)
    parameters = named_leaves(actual[0].model)
    for name, leaf in named_leaves(expected[0].model).items():
        np.testing.assert_allclose(parameters[name], leaf, rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(expert=4, model=2)], ids=["one device", "1x4x2"])
def test_three_steps_are_the_same_on_every_mesh(
    tiny: Config, batch: dict[str, np.ndarray], reference: tuple[TrainState, Metrics], mesh: MeshConfig
) -> None:
    config = changed(tiny, mesh={"data": mesh.data, "expert": mesh.expert, "model": mesh.model})
    assert_same(take_steps(config, batch, 3, devices=1 if mesh.expert == 1 else 8), reference)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_change_nothing(tiny: Config, batch: dict[str, np.ndarray], count: int) -> None:
    # Without noise: micro-batches draw their own.
    quiet = changed(tiny, moe={"jitter_noise": 0.0})
    expected = take_steps(quiet, batch, 2, devices=8)
    devices = 8 // count  # each with the 3 rows of one of the decoder's groups at a time
    mesh = {"data": 2, "expert": devices // 2}
    accumulated = changed(quiet, train={"accumulation_steps": count}, mesh=mesh)
    actual = take_steps(accumulated, batch, 2, devices)
    assert_same(actual, expected)
    for name, norm in expected[1]["gradient_norms"].items():
        np.testing.assert_allclose(actual[1]["gradient_norms"][name], norm, rtol=2e-5, atol=1e-7, err_msg=name)


def test_finite_steps_are_the_same_where_others_are_skipped(
    tiny: Config, batch: dict[str, np.ndarray], reference: tuple[TrainState, Metrics]
) -> None:
    assert_same(take_steps(changed(tiny, train={"non_finite": "skip"}), batch, 3), reference)


def test_padding_rows_change_nothing(tiny: Config, batch: dict[str, np.ndarray]) -> None:
    quiet = changed(tiny, moe={"jitter_noise": 0.0})
    empty = {name: np.concatenate([rows, np.zeros_like(rows)]) for name, rows in batch.items()}
    assert_same(take_steps(quiet, empty, 1), take_steps(quiet, batch, 1))


def test_the_schedule_counts_optimizer_steps_and_tokens_leave_out_padding(
    batch: dict[str, np.ndarray], reference: tuple[TrainState, Metrics]
) -> None:
    state, metrics = reference
    assert state.step == 3
    assert metrics["learning_rate"] == pytest.approx(10**-0.5)  # rsqrt, still in the warm-up of 10
    assert metrics["tokens"] == sum(np.sum(batch[f"{stack}_segments"] > 0) for stack in ("encoder", "decoder"))


def test_metrics_of_routing_are_there_for_each_moe_layer(tiny: Config, reference: tuple[TrainState, Metrics]) -> None:
    metrics = reference[1]
    assert metrics["expert_load"].shape == (2, tiny.moe.num_experts)  # one MoE layer a stack
    np.testing.assert_allclose(metrics["expert_load"].sum(axis=1), 1, rtol=1e-6)
    assert 0 <= metrics["fraction_tokens_dropped"] < 1
    assert metrics["load_balance_loss"] >= 1 - 1e-3
    assert 0 < metrics["router_entropy"] <= np.log(4) + 1e-6
    assert all(norm > 0 for norm in metrics["gradient_norms"].values())


def test_one_batch_is_learnt(tiny: Config, batch: dict[str, np.ndarray], reference: tuple[TrainState, Metrics]) -> None:
    _, later = take_steps(tiny, batch, 40)
    assert later["loss"] < reference[1]["loss"] - 1.0


def weights_of_every_rule(sizes: RouterSizes, key: jax.Array) -> dict[str, Weight]:
    others = {rule: Weight(jnp.ones(2), (None,), rule) for rule in ("frozen", "sign", "average")}
    return linear_router(sizes, key) | others


def route_by_every_rule(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """Switch's routing; the gradients of the others are (3, -3) a group."""
    routing = route_switch({"logits": weights["logits"]}, tokens, config)

    def loss(weight: jax.Array) -> jax.Array:
        value = jnp.sum(jnp.array([3.0, -3.0]) * (weight - jax.lax.stop_gradient(weight)))
        return jnp.broadcast_to(value, tokens.mask.shape[:1])

    updates = {"bias_loss": loss(weights["sign"]), "average_loss": loss(weights["average"])}
    return dataclasses.replace(routing, losses=routing.losses | updates)


def test_router_weights_move_by_their_own_rules_whatever_the_micro_batches(
    tiny: Config, batch: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUTERS, "every rule", Router(route_by_every_rule, weights_of_every_rule))
    config = changed(tiny, moe={"router": "every rule"}, train={"accumulation_steps": 2}, mesh={"data": 1, "expert": 4})
    state, metrics = take_steps(config, batch, 1, devices=4)
    parameters = named_leaves(state.model)
    moved = {name for name in parameters if name.rpartition("/")[2] in ("frozen", "sign", "average")}
    assert len(moved) == 6  # three weights in one MoE layer a stack
    for name in moved:
        stack, rule = name.split("/")[0], name.rpartition("/")[2]
        groups = batch[f"{stack}_segments"].size // tiny.moe.tokens_per_group(12, batch[f"{stack}_segments"].shape[1])
        expected = {
            "frozen": [1, 1],
            "sign": [1 - tiny.moe.bias_update_rate, 1 + tiny.moe.bias_update_rate],
            "average": [1 - 0.1 * 3 * groups / 2, 1 + 0.1 * 3 * groups / 2],  # the mean over two micro-batches
        }[rule]
        np.testing.assert_allclose(parameters[name], [expected], rtol=1e-6, err_msg=name)
    norms = metrics["gradient_norms"]
    assert all(norms[name] > 1 for name in moved if "frozen" not in name)
    trained = np.sqrt(sum(norm**2 for name, norm in norms.items() if name not in moved))
    np.testing.assert_allclose(metrics["gradient_norm"], trained, rtol=1e-5)
    assert not {"bias_loss", "average_loss"} & set(metrics)


def test_reinforced_routing_trains_its_policy_and_no_gradient_flows_through_the_reward(
    tiny: Config, batch: dict[str, np.ndarray]
) -> None:
    reinforced = {"router": "reinforced", "load_balance_loss_weight": 0.0, "policy_entropy_loss_weight": 0.0}
    in_two = changed(tiny, moe=reinforced, train={"accumulation_steps": 2}, mesh={"data": 1, "expert": 4})
    with_policy, without = (
        take_steps(changed(in_two, moe={"policy_loss_weight": weight}), batch, 1, devices=4)[1] for weight in (1.0, 0.0)
    )
    # At the start the baseline is 0 and the reward about -log V: half its square, less log pi times it.
    assert 0.2 < with_policy["policy_loss"] / (np.log(352) ** 2 / 2) < 5
    assert -np.log(4) - 1e-5 <= with_policy["policy_entropy_loss"] < 0
    norms, plain = with_policy["gradient_norms"], without["gradient_norms"]
    # What comes after the last router bears on the reward alone: the same program but for the order of sums.
    for name in ("decoder/norm/scale", "decoder/runs/0/blocks/1/ff/experts/w_out"):
        np.testing.assert_allclose(norms[name], plain[name], rtol=1e-4, err_msg=name)
    for stack in ("encoder", "decoder"):
        router = f"{stack}/runs/0/blocks/1/ff/router"
        assert norms[f"{router}/logits"] > 10 * plain[f"{router}/logits"]
        assert norms[f"{router}/baseline"] > 0 == plain[f"{router}/baseline"]
