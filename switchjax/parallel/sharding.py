"""Logical axis names -> mesh axes: one table, and what follows from it for parameters and optimiser state.

A parameter carries the names of its axes as metadata (`nnx.Param(value, axes=("embed", "mlp"))`). A module that
`lax.scan` or `vmap` has sliced keeps the names of the whole, so names are matched to dimensions from the right.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from switchjax.parallel.mesh import DATA, EXPERT, MODEL

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": (DATA, EXPERT),  # rows, and with them tokens and groups, lie over both
    "group": (DATA, EXPERT),
    "length": None,
    "embed": None,
    "vocab": MODEL,
    "heads": MODEL,
    "head": None,
    "mlp": MODEL,
    "expert": EXPERT,
    "layer": None,
    "bucket": None,
}

Tree = TypeVar("Tree")


def partition_spec(*axes: str | None) -> PartitionSpec:
    """Mesh axes of an array with these logical axes (None: not divided)."""
    return PartitionSpec(*(None if axis is None else AXIS_RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays `x` over the mesh in context as its logical axes say; without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*axes))


def is_variable(node: object) -> bool:
    """Whether a pytree node is a parameter with its metadata."""
    return isinstance(node, nnx.Variable)


def parameter_specs(model: Tree) -> Tree:
    """The tree of `model` with each parameter replaced by the `PartitionSpec` of its axes."""

    def spec(variable: nnx.Variable) -> PartitionSpec:
        axes = variable.get_metadata("axes")
        return partition_spec(*axes[len(axes) - len(variable.shape) :])

    return jax.tree.map(spec, model, is_leaf=is_variable)


def parameter_shardings(model: Tree, mesh: Mesh) -> Tree:
    """Like `parameter_specs`, with a `NamedSharding` on `mesh` in place of each parameter."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(model))


def named_leaves(tree: object) -> dict[str, Any]:
    """Leaves under names such as `decoder/norm/scale`: what optimisers, checkpoints and messages call them."""
    # A parameter is a node around one leaf, which adds nothing to the name.
    return {name: jax.tree.leaves(node)[0] for name, node in _named_nodes(tree).items()}


def _named_nodes(tree: object) -> dict[str, Any]:
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}


def with_leaves(tree: Tree, named: Mapping[str, Any]) -> Tree:
    """`tree` with the leaves of these names: the inverse of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in named_leaves(tree)])


def optimizer_shardings(opt_state: Tree, model: nnx.Module, mesh: Mesh) -> Tree:
    """Shardings for the state of an optimiser of `named_leaves(model)`, leaf by leaf.

    What belongs to a parameter is laid out as that parameter; where Adafactor has averaged one dimension away, so is
    the mesh axis of that dimension. Anything else is replicated.

    Args:
        opt_state: the state, arrays or their shapes.
        model: the parameters it belongs to, arrays or their shapes.
        mesh: the device mesh.
    """
    variables = _named_nodes(model)

    def sharding(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        owners = [variables[key.key] for key in path if isinstance(key, DictKey) and key.key in variables]
        fields = [key.name for key in path if isinstance(key, GetAttrKey)]
        return NamedSharding(mesh, _statistic_spec(owners[-1], fields[-1], leaf.shape) if owners else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, in order.

    They need not lie side by side, as a pod's mesh follows its network, nor be this process' alone: over `model`,
    processes divide the weights and share rows.
    """
    sharding = NamedSharding(mesh, partition_spec("batch"))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in held if index for row in range(*index[0].indices(batch_size))})


def _statistic_spec(variable: nnx.Variable, field: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Of what an optimiser keeps of a parameter, in Adafactor's state under the name `field`."""
    axes, whole = list(variable.get_metadata("axes")), variable.shape
    first = 1 if axes[0] == "layer" else 0
    if field in ("v_row", "v_col") and len(whole) > first + 1:
        # A row's mean is over the largest dimension, a column's over the second largest: of one layer, and by the
        # function by which optax finds them, for where two are equal.
        averaged = first + int(np.argsort(whole[first:])[-1 if field == "v_row" else -2])
        axes, whole = axes[:averaged] + axes[averaged + 1 :], whole[:averaged] + whole[averaged + 1 :]
    # Stand-ins of one number for what is not kept lie on every device.
    return partition_spec(*axes) if shape == whole else PartitionSpec()
