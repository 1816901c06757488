"""The devices of a slice that need not be there, and the mesh that suits a config on them."""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from switchjax.accounting.hardware import Slice
from switchjax.config import Config, MeshConfig, UserError
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.training.state import StatePlan, plan_state

_OPEN = MeshConfig()
"""A mesh of these sizes is open: `choose_mesh` sets it."""
_COMPILER_SETTINGS = {
    # Compiling holds no TPU, so several processes may do it at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # libtpu asks for these of a TPU machine; without answers it searches the network, and complains on stderr.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
}
_MOST_MODEL = 16
"""The largest `model` axis of `choose_mesh`: matmuls shrink with it, their all-reduces of activations do not."""
_STATE_SHARE = 0.7
"""The share of memory that parameters, gradients and optimiser may fill before `choose_mesh` slices matrices."""


def require_compiler() -> None:
    """Raises a `UserError` unless libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology and --fit need the TPU compiler: pip install -c constraints.txt libtpu")


def describe_devices(slice_: Slice) -> list[jax.Device]:
    """The devices of a slice that need not exist; programs can be compiled for them, not run.

    Raises:
        UserError: if libtpu is not installed or knows no such slice.
    """
    require_compiler()
    for name, value in _COMPILER_SETTINGS.items():
        os.environ.setdefault(name, value)
    # A host has 2 x 2 chips, a slice of one chip less. The two cores of a v4 chip work as one device where asked to.
    host = tuple(min(size, most) for size, most in zip((*slice_.shape, 1)[:3], (2, 2, 1), strict=True))
    options: dict[str, Any] = {"chips_per_host_bounds": host}
    if slice_.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(slice_.chip.shapes)
        raise UserError(f"the TPU compiler cannot describe {slice_.name} (known slices: {known}): {error}") from None
    assert len(described) == slice_.devices, f"{slice_.name} has {len(described)} devices"
    return list(described)


def choose_mesh(config: Config, slice_: Slice, devices: Sequence[jax.Device]) -> MeshConfig:
    """The config's own mesh if it sets one; otherwise the smallest `model` axis, from 1 to 16, with which

    - `expert` is the greatest common divisor of the remaining devices and of every layer's number of experts: no
      expert's parameters lie on more devices than they must; `data` is what then remains,
    - rows, heads and matrices divide over the mesh,
    - parameters, their gradients and the optimiser's state fill at most 0.7 of a device's memory.

    Without any such mesh, the one with the largest `model` axis that divides everything.

    Raises:
        UserError: if no mesh divides the config's sizes; says what the first of them lacked.
    """
    if (config.mesh.data, config.mesh.expert, config.mesh.model) != (_OPEN.data, _OPEN.expert, _OPEN.model):
        return config.mesh
    fitting, refusals = [], []
    for choice in _meshes(config, len(devices)):
        mesh = make_mesh(choice, devices)
        try:
            check_fit(config, mesh)
        except UserError as error:
            refusals.append(error)
            continue
        fitting.append(choice)
        parameters, optimizer = state_bytes(plan_state(config, mesh))
        if 2 * parameters + optimizer <= _STATE_SHARE * slice_.chip.memory:
            return choice
    if not fitting:
        raise refusals[0]
    return fitting[-1]


def _meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """Candidates with a growing `model` axis; experts lie over at least two devices where there are two."""
    experts = {layer.num_experts for stack in config.model.stacks for layer in config.layers(stack)} - {0}
    for model in range(1, min(devices, _MOST_MODEL) + 1):
        if devices % model == 0:
            expert = math.gcd(devices // model, *experts) if experts else 1
            if model == 1 or expert > 1 or not experts:
                yield MeshConfig(-1, expert, model)


def state_bytes(plan: StatePlan) -> tuple[int, int]:
    """Bytes of parameters and of the optimiser's state on one device."""
    shapes, shardings = plan.shapes, plan.shardings
    return sum(leaf_bytes(shapes.model, shardings.model)), sum(leaf_bytes(shapes.opt_state, shardings.opt_state))


def leaf_bytes(shapes: Any, shardings: Any) -> list[int]:
    """Bytes of each array of a tree on one device."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return [math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in leaves]
