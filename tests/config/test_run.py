"""Fields of the sections `optimizer`, `train` and `evaluate` have their effects."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from switchjax.config import Config, MeshConfig, OptimizerConfig, TrainConfig
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.training.optimizer import make_optimizer
from switchjax.training.state import plan_state
from switchjax.training.step import train_step
from tests.models.families import FAMILIES, make_batch
from tests.tiny import changed


class Weights(nnx.Module):
    """Weights too small for Adafactor to factor the second moment."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.array([[3.0, -4.0, 0.5], [1.0, 2.0, -1.0]]), axes=("embed", "mlp"))


GRADIENTS = np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32)


def steps_of(gradients: np.ndarray, **settings: object) -> list[np.ndarray]:
    """The weights before and after each update, at a constant learning rate."""
    config = Config(optimizer=OptimizerConfig(schedule="constant", warmup_steps=0, **settings), train=TrainConfig())
    model = Weights()
    optimizer, parameters = make_optimizer(config, model), named_leaves(model)
    state, update, found = optimizer.init(parameters), jax.jit(optimizer.update), [parameters["weight"]]
    for gradient in gradients:
        updates, state = update({"weight": jnp.asarray(gradient)}, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        found.append(parameters["weight"])
    return [np.asarray(weight, np.float64) for weight in found]


def test_adamw_is_its_equations_with_the_configs_moments_and_decay() -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
    rate, b1, b2, decay = 0.1, 0.6, 0.7, 0.3
    found = steps_of(GRADIENTS, name="adamw", learning_rate=rate, b1=b1, b2=b2, weight_decay=decay)
    first, second, weight = np.zeros((2, 3)), np.zeros((2, 3)), found[0]
    for step, gradient in enumerate(np.asarray(GRADIENTS, np.float64), 1):
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        direction = first / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + 1e-8)
        weight = weight - rate * (direction + decay * weight)
        np.testing.assert_allclose(found[step], weight, rtol=1e-5)


def test_adafactor_is_its_equations_with_the_configs_decay_rate() -> None:
    """Adafactor (Shazeer and Stern 2018, algorithm 4) without factoring; relative steps, updates clipped at 1."""
    rate, decay_rate = 0.1, 0.5
    found = steps_of(GRADIENTS, learning_rate=rate, decay_rate=decay_rate)
    second, weight = np.zeros((2, 3)), found[0]
    for step, gradient in enumerate(np.asarray(GRADIENTS, np.float64), 1):
        decay = 1 - step**-decay_rate
        second = decay * second + (1 - decay) * gradient**2
        update = gradient / np.sqrt(second)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        weight = weight - rate * np.sqrt(np.mean(weight**2)) * update
        np.testing.assert_allclose(found[step], weight, rtol=1e-4)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_weight_decay_shrinks_what_has_no_gradient(name: str) -> None:
    zero = np.zeros((1, 2, 3), np.float32)
    before, after = steps_of(zero, name=name, learning_rate=0.5, weight_decay=0.1)
    shares = after / before
    np.testing.assert_allclose(shares, shares[0, 0], rtol=1e-5)
    assert 0.5 < shares[0, 0] < 0.99
    np.testing.assert_array_equal(*steps_of(zero, name=name, learning_rate=0.5))


def test_the_seed_decides_parameters_and_noise() -> None:
    config = changed(FAMILIES["gpt"], model={"dropout": 0.5, "pattern": ("dense",), "num_decoder_layers": 1})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        states, losses = [], []
        for seed in (0, 1):
            seeded = changed(config, train={"seed": seed})
            plan = plan_state(seeded, mesh)
            states.append(plan.create())
            # From the same parameters, so that the noise alone differs.
            step = jax.jit(partial(train_step, config=seeded, optimizer=plan.optimizer))
            losses.append(float(step(states[0], make_batch(config))[1]["loss"]))
    vectors = [np.asarray(named_leaves(state.model)["embedding/vectors"]) for state in states]
    assert not np.allclose(*vectors)
    assert losses[0] != losses[1]
