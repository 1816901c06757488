"""The train step: dividing the batch does not change its gradients, and router state follows its own rule."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, MeshConfig, MoEConfig
from switchjax.data.text import TextData
from switchjax.moe.routers import ROUTERS
from switchjax.moe.routers.switch import route_switch
from switchjax.moe.routing import (
    NoOptions,
    Router,
    RouterSizes,
    Routing,
    Tokens,
    Weight,
    Weights,
    linear_router,
)
from switchjax.parallel.mesh import make_mesh, one_at_a_time
from switchjax.parallel.sharding import named_leaves, place_batch
from switchjax.training.state import TrainState, plan_state
from switchjax.training.step import Metrics, train_step
from tests.tiny import changed


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
    """Equal up to float32 rounding, which three optimiser steps at unit scale turn into a few 1e-5."""
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
    # Without noise, because each micro-batch draws its own.
    quiet = changed(tiny, moe={"jitter_noise": 0.0})
    expected = take_steps(quiet, batch, 2, devices=8)
    devices = 8 // count  # each holds the 3 rows of one decoder group at a time
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


@pytest.mark.slow
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
    for name in ("router_entropy", "fraction_tokens_dropped", "dead_experts"):
        assert metrics[f"{name}_by_layer"].shape == (2,)
        np.testing.assert_allclose(np.mean(metrics[f"{name}_by_layer"]), metrics[name], rtol=1e-6)
    np.testing.assert_array_equal(metrics["dead_experts_by_layer"], np.sum(metrics["expert_load"] == 0, axis=1))
    assert all(norm > 0 for norm in metrics["gradient_norms"].values())


def test_one_batch_is_learnt(tiny: Config, batch: dict[str, np.ndarray], reference: tuple[TrainState, Metrics]) -> None:
    _, later = take_steps(tiny, batch, 40)
    assert later["loss"] < reference[1]["loss"] - 1.0


@dataclass(frozen=True)
class CountingOptions:
    rate: float = 0.5


def counting_weights(sizes: RouterSizes, options: CountingOptions, key: jax.Array) -> dict[str, Weight]:
    state = {name: Weight(jnp.ones(2), (None,), trained=False) for name in ("frozen", "counter")}
    return linear_router(sizes, options, key) | state


def route_and_count(weights: Weights, tokens: Tokens, config: MoEConfig, options: CountingOptions) -> Routing:
    """Switch's routing, with counts of real tokens and of groups."""
    routing = route_switch({"logits": weights["logits"]}, tokens, config, NoOptions())
    real = jnp.sum(tokens.mask, axis=1, dtype=jnp.float32)
    return dataclasses.replace(routing, state_sums={"seen": jnp.stack([real, jnp.ones_like(real)], axis=1)})


def count(weights: Weights, sums: dict[str, jax.Array], options: CountingOptions) -> dict[str, jax.Array]:
    return {"counter": weights["counter"] + options.rate * sums["seen"]}


@pytest.mark.slow
def test_router_state_moves_by_the_routers_own_rule_and_nothing_else_moves_it(
    tiny: Config, batch: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router(route_and_count, counting_weights, options=CountingOptions, next_state=count)
    monkeypatch.setitem(ROUTERS, "counting", router)
    moe = {"router": "counting", "options": {"rate": 0.25}}
    optimizer = {"weight_decay": 0.1, "clip_norm": 0.1}
    config = changed(tiny, moe=moe, optimizer=optimizer, train={"accumulation_steps": 2}, mesh={"data": 1, "expert": 4})
    state, metrics = take_steps(config, batch, 2, devices=4)
    parameters, norms = named_leaves(state.model), metrics["gradient_norms"]
    kept = {name for name in parameters if name.rpartition("/")[2] in ("frozen", "counter")}
    assert len(kept) == 4  # two weights in one MoE layer a stack
    for stack in ("encoder", "decoder"):
        segments, router_name = batch[f"{stack}_segments"], f"{stack}/scans/0/blocks/1/ff/router"
        groups = segments.size // tiny.moe.tokens_per_group(12, segments.shape[1])
        seen = 2 * np.array([np.sum(segments > 0), groups])  # two steps, each in two micro-batches
        np.testing.assert_allclose(parameters[f"{router_name}/counter"], [1 + 0.25 * seen], rtol=1e-6)
        np.testing.assert_array_equal(parameters[f"{router_name}/frozen"], [[1, 1]])
    assert all(norms[name] == 0 for name in kept)
    trained = np.sqrt(sum(norm**2 for name, norm in norms.items() if name not in kept))
    np.testing.assert_allclose(metrics["gradient_norm"], trained, rtol=1e-5)


@pytest.mark.slow
def test_reinforced_routing_trains_its_policy_and_no_gradient_flows_through_the_reward(
    tiny: Config, batch: dict[str, np.ndarray]
) -> None:
    reinforced = {"router": "reinforced"}
    others = {"load_balance_loss": 0.0, "policy_entropy_loss": 0.0}
    in_two = changed(tiny, moe=reinforced, train={"accumulation_steps": 2}, mesh={"data": 1, "expert": 4})
    with_policy, without = (
        take_steps(changed(in_two, moe={"loss_weights": others | {"policy_loss": weight}}), batch, 1, devices=4)[1]
        for weight in (1.0, 0.0)
    )
    # At the start the baseline is 0 and the reward about -log V: half its square, less log pi times it.
    assert 0.2 < with_policy["policy_loss"] / (np.log(352) ** 2 / 2) < 5
    assert -np.log(4) - 1e-5 <= with_policy["policy_entropy_loss"] < 0
    norms, plain = with_policy["gradient_norms"], without["gradient_norms"]
    # Parameters after the last router affect only the reward: the program differs only in the order of sums.
    for name in ("decoder/norm/scale", "decoder/scans/0/blocks/1/ff/experts/w_out"):
        np.testing.assert_allclose(norms[name], plain[name], rtol=1e-4, err_msg=name)
    for stack in ("encoder", "decoder"):
        router = f"{stack}/scans/0/blocks/1/ff/router"
        assert norms[f"{router}/logits"] > 10 * plain[f"{router}/logits"]
        assert norms[f"{router}/baseline"] > 0 == plain[f"{router}/baseline"]
