"""Schedules follow their formulas; stacked layers are optimised separately; router state stays as it is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from switchjax.config import Config, OptimizerConfig, TrainConfig
from switchjax.models.parameters import count_trained, is_trained
from switchjax.parallel.sharding import named_leaves
from switchjax.parallel.stacking import stack
from switchjax.training.optimizer import make_optimizer, make_schedule


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (99, 0.1), (100, 0.1), (400, 0.05), (10_000, 0.01)])
def test_rsqrt_is_constant_until_the_warm_up_ends_and_falls_from_there(step: int, expected: float) -> None:
    schedule = make_schedule(OptimizerConfig(schedule="rsqrt", learning_rate=1.0, warmup_steps=100), steps=1000)
    assert float(schedule(jnp.array(step))) == pytest.approx(expected, rel=1e-6)


def test_linear_rises_and_falls_along_lines() -> None:
    schedule = make_schedule(OptimizerConfig(schedule="linear", learning_rate=2.0, warmup_steps=10), steps=110)
    actual = [float(schedule(jnp.asarray(step))) for step in (0, 4, 9, 10, 60, 85, 110)]
    np.testing.assert_allclose(actual, [0.2, 1.0, 2.0, 2.0, 1.0, 0.5, 0.0], rtol=1e-5, atol=1e-6)


def test_cosine_rises_linearly_and_ends_at_zero() -> None:
    schedule = make_schedule(OptimizerConfig(schedule="cosine", learning_rate=2.0, warmup_steps=10), steps=110)
    values = [float(schedule(jnp.array(step))) for step in (0, 4, 9, 10, 60, 110)]
    assert values == pytest.approx([0.2, 1.0, 2.0, 2.0, 1 + math.cos(math.pi / 2), 0.0], abs=1e-6)


def test_constant_stays_after_the_warm_up() -> None:
    schedule = make_schedule(OptimizerConfig(schedule="constant", learning_rate=3.0, warmup_steps=3), steps=10)
    assert [float(schedule(jnp.array(step))) for step in (0, 2, 3, 1000)] == pytest.approx([1, 3, 3, 3])


def config_with(optimizer: OptimizerConfig) -> Config:
    return Config(optimizer=optimizer, train=TrainConfig(steps=10))


class Matrix(nnx.Module):
    """One weight, large enough for Adafactor to factor its second moment."""

    def __init__(self, key: jax.Array):
        scale = jax.random.uniform(key, (), minval=0.01, maxval=10.0)
        self.weight = nnx.Param(scale * jax.random.normal(key, (128, 130)), axes=("embed", "mlp"))


class Layers(nnx.Module):
    def __init__(self, key: jax.Array):
        self.layers = stack(Matrix, jax.random.split(key, 3), "layer")
        self.last = Matrix(key)


def test_adafactor_treats_each_layer_of_a_stack_as_if_it_were_alone() -> None:
    model = Layers(jax.random.key(0))
    config = OptimizerConfig(schedule="constant", learning_rate=0.1, warmup_steps=0)
    optimizer = make_optimizer(config_with(config), model)
    alone = optax.adafactor(0.1, decay_rate=0.8, clipping_threshold=1.0, multiply_by_parameter_scale=True)
    parameters = named_leaves(model)
    state = optimizer.init(parameters)
    layers = [{"weight": parameters["layers/weight"][i]} for i in range(3)]
    states = [alone.init(layer) for layer in layers]
    for step in range(3):
        gradients = {
            name: jax.random.normal(jax.random.fold_in(jax.random.key(step), i), leaf.shape)
            for i, (name, leaf) in enumerate(parameters.items())
        }
        updates, state = optimizer.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        for i in range(3):
            update, states[i] = alone.update({"weight": gradients["layers/weight"][i]}, states[i], layers[i])
            layers[i] = optax.apply_updates(layers[i], update)
    for i in range(3):  # the same operations, vectorised: rounding only
        np.testing.assert_allclose(parameters["layers/weight"][i], layers[i]["weight"], rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped_to_its_global_norm() -> None:
    model = Layers(jax.random.key(0))
    config = OptimizerConfig(name="adamw", schedule="constant", warmup_steps=0, clip_norm=1e-9, learning_rate=1.0)
    parameters = named_leaves(model)
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 100.0), parameters)
    optimizer = make_optimizer(config_with(config), model)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    # Adam divides by |gradient| + 1e-8: unclipped updates would be 1, clipped gradients are far below that epsilon.
    assert float(optax.tree.norm(updates)) < 0.1 * math.sqrt(sum(leaf.size for leaf in parameters.values()))


class Router(nnx.Module):
    """A trained matrix and, if asked for, a vector of state."""

    def __init__(self, key: jax.Array, with_state: bool):
        self.logits = nnx.Param(jax.random.normal(key, (128, 130)), axes=("embed", None))
        if with_state:
            self.bias = nnx.Param(jax.random.normal(key, (4,)), axes=(None,), trained=False)


class Routers(nnx.Module):
    """Single routers, stacked ones, and a stack that has only a table of state."""

    def __init__(self, key: jax.Array, with_state: bool):
        self.layers = stack(lambda key: Router(key, with_state), jax.random.split(key, 3), "layer")
        self.last = Router(key, with_state)
        if with_state:
            self.tables = nnx.Param(jnp.ones((2, 4)), axes=("layer", None), trained=False)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_state_stays_as_it_is_and_changes_nothing_of_what_is_trained(name: str) -> None:
    config = config_with(
        OptimizerConfig(
            name=name, schedule="constant", learning_rate=0.1, warmup_steps=0, clip_norm=1.0, weight_decay=0.1
        )
    )
    model, alone = (Routers(jax.random.key(0), with_state) for with_state in (True, False))
    parameters, expected = named_leaves(model), named_leaves(alone)
    trained = is_trained(model)
    assert {leaf for leaf in trained if trained[leaf]} == set(expected)
    assert count_trained(model) == sum(leaf.size for leaf in expected.values())
    first = parameters
    optimizers = make_optimizer(config, model), make_optimizer(config, alone)
    states = [optimizers[0].init(parameters), optimizers[1].init(expected)]
    steps = [jax.jit(optimizer.update) for optimizer in optimizers]
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradients = {n: jnp.asarray(100 * rng.normal(size=leaf.shape), jnp.float32) for n, leaf in parameters.items()}
        updates, states[0] = steps[0](gradients, states[0], parameters)
        parameters = optax.apply_updates(parameters, updates)
        updates, states[1] = steps[1]({n: gradients[n] for n in expected}, states[1], expected)
        expected = optax.apply_updates(expected, updates)
    for n in ("tables", "layers/bias", "last/bias"):
        np.testing.assert_array_equal(parameters[n], first[n])
    for n, value in expected.items():
        assert np.any(np.asarray(value) != np.asarray(first[n]))
        np.testing.assert_allclose(parameters[n], value, rtol=1e-6, atol=1e-6, err_msg=n)
