"""Describes the devices of a slice that need not be attached, and chooses a config's mesh on them."""

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
"""The default sizes: `choose_mesh` replaces them."""
_COMPILER_SETTINGS = {
    # Several processes may compile at once, as none of them holds a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # libtpu asks a TPU machine for these; unanswered, it searches the network and complains on stderr.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
}
_MOST_MODEL = 16
"""The largest `model` axis of `choose_mesh`: it makes matmuls smaller, but not their all-reduces."""
_STATE_SHARE = 0.7
"""`choose_mesh` divides matrices if parameters, gradients and optimiser fill more than this share of memory."""


def require_compiler() -> None:
    """Raises a `UserError` unless libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology and --fit need the TPU compiler: pip install -c constraints.txt libtpu")


def describe_devices(slice_: Slice) -> list[jax.Device]:
    """The devices of a slice; they need not exist: programs can be compiled for them, but not run.

    Raises:
        UserError: if libtpu is not installed or does not know the slice.
    """
    require_compiler()
    for name, value in _COMPILER_SETTINGS.items():
        os.environ.setdefault(name, value)
    # A host has 2 x 2 chips, or fewer in a smaller slice.
    host = tuple(min(size, most) for size, most in zip((*slice_.shape, 1)[:3], (2, 2, 1), strict=True))
    options: dict[str, Any] = {"chips_per_host_bounds": host}
    if slice_.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # makes a chip's two cores one device
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(slice_.chip.shapes)
        raise UserError(f"the TPU compiler cannot describe {slice_.name} (known slices: {known}): {error}") from None
    assert len(described) == slice_.devices, f"{slice_.name} has {len(described)} devices"
    return list(described)


def choose_mesh(config: Config, slice_: Slice, devices: Sequence[jax.Device]) -> MeshConfig:
    """The config's own mesh if it sets one; otherwise the mesh with the smallest `model` axis, from 1 to 16, such that

    - `expert` is the greatest common divisor of the remaining devices and of every layer's number of experts, so that
      as few devices as possible hold copies of an expert; `data` takes the devices that remain,
    - rows, heads and matrices divide over the mesh,
    - parameters, their gradients and the optimiser's state fill at most 0.7 of a device's memory.

    If there is none, it is the mesh with the largest `model` axis that divides everything.

    Raises:
        UserError: if no mesh divides the config's sizes; says why the first one does not.
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
    """Candidates by growing `model` axis; above model = 1, a model with experts needs an `expert` axis above 1."""
    experts = {layer.num_experts for stack in config.model.stacks for layer in config.layers(stack)} - {0}
    for model in range(1, min(devices, _MOST_MODEL) + 1):
        if devices % model == 0:
            expert = math.gcd(devices // model, *experts) if experts else 1
            if model == 1 or expert > 1 or not experts:
                yield MeshConfig(-1, expert, model)


def state_bytes(plan: StatePlan) -> tuple[int, int]:
    """Bytes on one device of the parameters and of the optimiser's state."""
    shapes, shardings = plan.shapes, plan.shardings
    return sum(leaf_bytes(shapes.model, shardings.model)), sum(leaf_bytes(shapes.opt_state, shardings.opt_state))


def leaf_bytes(shapes: Any, shardings: Any) -> list[int]:
    """Bytes on one device of each array of a tree."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return [math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in leaves]
