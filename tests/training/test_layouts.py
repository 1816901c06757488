"""Three train steps in every layout of the Switch Transformer's section 5, and sharded, equal those of one device.

Each (layout, model) is compiled once: the same program is run and its collectives are counted.
"""

import dataclasses
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import Config, MeshConfig, OptimizerConfig
from switchjax.parallel.mesh import check_fit, make_mesh, one_at_a_time
from switchjax.parallel.sharding import named_leaves, partition_spec
from switchjax.planning.hlo import parse_compiled
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.layouts import BACKWARD, FORWARD, UPDATE, Route, communication
from switchjax.training.state import StatePlan, TrainState, plan_state
from switchjax.training.step import Metrics, lower_train_step
from tests.models.families import FAMILIES, make_batch, make_model
from tests.test_configs import MODULES
from tests.tiny import changed

LAYOUTS = {name: MeshConfig(**fields) for name, fields in MODULES["layouts"].SIZES.items()} | {
    "optimizer": MeshConfig(data=8, sharded="optimizer"),
    "fsdp, expert": MeshConfig(data=2, expert=4, sharded="parameters"),
}
STEPS = 3


def _in_eighths(config: Config, heads: int, kv_heads: int) -> Config:
    """The config with sizes that 8 devices divide, and an optimiser whose first moment is the gradient."""
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "d_head": 32 // heads}
    optimizer = OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant", warmup_steps=1)
    return dataclasses.replace(changed(config, model=sizes, moe={"num_experts": 8}), optimizer=optimizer)


MODELS = {
    # Two equal layers are one loop, as in models of any depth.
    "switch": changed(_in_eighths(FAMILIES["sinusoidal"], 8, 8), model={"pattern": ("moe",), "biases": False}),
    "mixtral": _in_eighths(FAMILIES["mixtral"], 16, 8),
    "v_moe": _in_eighths(FAMILIES["v_moe"], 8, 8),
}


class Run(NamedTuple):
    """The state after the first and the last step, every step's metrics, and the communication of a step."""

    first: TrainState
    last: TrainState
    metrics: list[Metrics]
    routes: dict[Route, Traffic]


def start(plan: StatePlan, config: Config) -> TrainState:
    """A state with random parameters and an optimiser state of zeros."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), plan.shapes)
    state = dataclasses.replace(zeros, model=make_model(config))
    return jax.device_put(state, plan.shardings)


def take_steps(config: Config, devices: int = 8) -> Run:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    check_fit(config, mesh)
    plan = plan_state(config, mesh)
    compiled = lower_train_step(config, plan, mesh).compile()
    batch = jax.device_put(make_batch(config), NamedSharding(mesh, partition_spec("batch")))
    state, states, metrics = start(plan, config), [], []
    for _ in range(STEPS):
        state, found = one_at_a_time(compiled(state, batch))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    routes = communication(parse_compiled(compiled), mesh.shape, least=4 * config.model.d_model)
    return Run(states[0], states[-1], metrics, routes)


@cache
def on_one_device(model: str) -> Run:
    return take_steps(dataclasses.replace(MODELS[model], mesh=MeshConfig(data=1)), devices=1)


@cache
def in_layout(layout: str, model: str) -> Run:
    return take_steps(dataclasses.replace(MODELS[model], mesh=LAYOUTS[layout]))


def assert_close(actual: object, expected: object) -> None:
    """Equal to 1e-5 of the largest number of each array, because float32 sums have another order.

    At least 1e-8, because the gradient of a bias of keys is only rounding.
    """
    wanted = named_leaves(expected)
    for name, leaf in named_leaves(actual).items():
        scale = max(float(np.abs(wanted[name]).max()), 1e-3)
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


SLOW = pytest.mark.slow
QUICK = ("fsdp, expert", "mixtral")
CASES = [QUICK] + [
    pytest.param(layout, model, marks=SLOW)
    for layout in MODULES["layouts"].SIZES
    for model in MODELS
    if (layout, model) != QUICK
]


@pytest.mark.parametrize(("layout", "model"), [*CASES, pytest.param("optimizer", "switch", marks=SLOW)])
def test_three_steps_are_those_of_one_device(layout: str, model: str) -> None:
    actual, expected = in_layout(layout, model), on_one_device(model)
    for found, wanted in zip(actual.metrics, expected.metrics, strict=True):
        assert wanted["fraction_tokens_dropped"] > 0 or model != "switch"
        for name in ("loss", "total_loss", "gradient_norm", "parameter_norm"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
    assert expected.metrics[-1]["loss"] < expected.metrics[0]["loss"]
    # AdamW's moments are the gradient and its square after one step, and combine all three after three.
    assert_close(actual.first.opt_state, expected.first.opt_state)
    assert_close(actual.last.opt_state, expected.last.opt_state)


@SLOW
@pytest.mark.parametrize("sharded", ["parameters", "optimizer"])
def test_adafactor_takes_the_same_steps_sharded(sharded: str) -> None:
    adafactor = dataclasses.replace(
        MODELS["mixtral"], optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=1)
    )
    mesh = MeshConfig(data=4, model=2, sharded=sharded)
    actual = take_steps(dataclasses.replace(adafactor, mesh=mesh))
    expected = take_steps(dataclasses.replace(adafactor, mesh=MeshConfig(data=1)), devices=1)
    assert_close(actual.last.opt_state, expected.last.opt_state)
    for found, wanted in zip(actual.metrics, expected.metrics, strict=True):
        np.testing.assert_allclose(found["total_loss"], wanted["total_loss"], rtol=1e-5)


LAYERS = 2
"""Layers of the Switch Transformer, attention and MoE counted separately."""
MATRICES = 7
"""Matrices of a layer: queries, keys, values, attention's output, router, two of the experts."""
# In both halves of a layer, the outputs of slices of heads or d_ff add up, and so do the gradients of their inputs.
# So do the embeddings of the slices of the vocabulary, and the softmax over it (largest, sum, target).
SLICED = {
    (FORWARD, "all-reduce", ("model",)): 2 * LAYERS + 1 + 3,
    (BACKWARD, "all-reduce", ("model",)): 2 * LAYERS + 1,
}
# There and back.
EXCHANGED = {(FORWARD, "all-to-all", ("expert",)): 2 * LAYERS, (BACKWARD, "all-to-all", ("expert",)): 2 * LAYERS}
GATHERED = {
    (FORWARD, "all-gather", ("data",)): MATRICES * LAYERS + 1,  # the embedding, once
    (BACKWARD, "all-gather", ("data",)): MATRICES * LAYERS,
}
PAPERS = {
    "data": {},
    "model": SLICED,
    "model-data": SLICED,
    "expert-data": EXCHANGED,
    "expert-model-data": SLICED | EXCHANGED,
    "fsdp": GATHERED,
}


@SLOW
@pytest.mark.parametrize("layout", PAPERS)
def test_a_layout_communicates_what_the_paper_says(layout: str) -> None:
    counts = {tuple(route): found.count for route, found in in_layout(layout, "switch").routes.items()}
    # XLA combines any number of gradients, and sums of the forward pass, into one all-reduce under the name of one of
    # them; on the CPU it has no reduce-scatter.
    gradients = {route for route in counts if route[1] == "all-reduce" and "model" not in route[2]}
    assert bool(gradients) == (layout != "model")
    assert {route: count for route, count in counts.items() if route not in gradients} == PAPERS[layout]


@SLOW
def test_a_sharded_optimiser_gathers_the_new_parameters_once() -> None:
    routes = in_layout("optimizer", "switch").routes
    gathers = [route for route in routes if route.kind != "all-reduce"]
    assert gathers == [Route(UPDATE, "all-gather", ("data",))]
    assert routes[Route(UPDATE, "all-gather", ("data",))].count == MATRICES + 1  # a stack of layers in one


def test_sharding_goes_with_the_exchange() -> None:
    routes = in_layout(*QUICK).routes
    assert {route: routes[Route(*route)].count for route in EXCHANGED} == EXCHANGED
    gathered = {route.axes for route in routes if route.kind == "all-gather"}
    assert gathered == {("data",), ("data", "expert")}  # experts over their columns, the rest over all
