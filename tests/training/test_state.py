"""A state has the shapes and shardings of its plan, and the same parameters on every mesh."""

import jax
import numpy as np

from switchjax.config import Config
from switchjax.parallel.mesh import make_mesh
from switchjax.training.state import TrainState, plan_state
from tests.tiny import changed


def create(config: Config, devices: int) -> TrainState:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        plan = plan_state(config, mesh)
        state = plan.create()
    for planned, sharding, leaf in zip(
        *map(jax.tree.leaves, (plan.shapes, plan.shardings, state)), strict=True
    ):  # fmt: skip
        assert (leaf.shape, leaf.dtype) == (planned.shape, planned.dtype)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.device_get(state)


def test_a_state_is_as_planned_and_its_parameters_are_the_same_on_every_mesh(tiny: Config) -> None:
    divided = create(tiny, 8)
    whole = create(changed(tiny, mesh={"data": 1, "expert": 1}), 1)
    assert divided.step == whole.step == 0
    for one, other in zip(jax.tree.leaves(divided), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
