"""The table from logical axes to mesh axes, and the layouts of parameters and optimiser state that follow from it.

A parameter carries the names of its axes as metadata (`nnx.Param(value, axes=("embed", "mlp"))`). A module that
`lax.scan` or `vmap` has sliced keeps the names of the whole, so names are matched to dimensions from the right.

The table gives the layout in which a parameter is used. With `mesh.sharded`, parameters or optimiser state are kept in
smaller parts (`sharded_spec`), and `unshard` gathers the parts before each use.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import DictKey, GetAttrKey

from switchjax.parallel.mesh import DATA, EXPERT, MODEL

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": (DATA, EXPERT),
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
    """The mesh axes of an array with these logical axes (None: not divided)."""
    return PartitionSpec(*(None if axis is None else AXIS_RULES[axis] for axis in axes))


def sharded_spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of a parameter that is sharded over the devices that divide the batch (ZeRO, FSDP).

    `embed`, a dimension of every matrix, is divided over those of the axes data and expert that no other dimension
    uses, so each expert stays on its devices. Vectors are not divided: the saved memory is not worth the time of
    gathering them.
    """
    spec = partition_spec(*axes)
    if sum(axis != "layer" for axis in axes) < 2:
        return spec
    free = tuple(axis for axis in (DATA, EXPERT) if axis not in spec)
    return PartitionSpec(*(free if axis == "embed" else used for axis, used in zip(axes, spec, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, laid over the mesh in context as its logical axes say; without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*axes))


def is_variable(node: object) -> bool:
    """True if a pytree node is a parameter with its metadata."""
    return isinstance(node, nnx.Variable)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes of the dimensions that remain after slicing."""
    axes = variable.get_metadata("axes")
    return axes[len(axes) - len(variable.shape) :]


def mark_sharded(model: Tree, sharded: str) -> Tree:
    """`model` with `MeshConfig.sharded` in the metadata of its parameters, for the functions below."""
    for variable in jax.tree.leaves(model, is_leaf=is_variable) if sharded != "none" else ():
        variable.set_metadata(sharded=sharded)
    return model


def _sharded(variable: nnx.Variable) -> str:
    return variable.get_metadata("sharded", "none")


def parameter_specs(model: Tree) -> Tree:
    """The tree of `model` with the `PartitionSpec` in which each parameter is used."""
    return jax.tree.map(lambda variable: partition_spec(*_axes(variable)), model, is_leaf=is_variable)


def parameter_shardings(model: Tree, mesh: Mesh) -> Tree:
    """The tree of `model` with the sharding on `mesh` in which each parameter is kept."""

    def sharding(variable: nnx.Variable) -> NamedSharding:
        spec = sharded_spec if _sharded(variable) == "parameters" else partition_spec
        return NamedSharding(mesh, spec(*_axes(variable)))

    return jax.tree.map(sharding, model, is_leaf=is_variable)


def unshard(model: Tree) -> Tree:
    """`model` with its sharded parameters gathered, as a layer uses them; without a mesh in context, `model` itself.

    The forward pass is an all-gather, the gradient a reduce-scatter. Stacks of layers stay sharded: their loop calls
    this function for one layer at a time.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return model

    def whole(variable: nnx.Variable) -> nnx.Variable:
        axes = _axes(variable)
        if _sharded(variable) != "parameters" or axes[:1] == ("layer",):
            return variable
        return variable.replace(_from_to(variable[...], sharded_spec(*axes), partition_spec(*axes)))

    return jax.tree.map(whole, model, is_leaf=is_variable)


def _from_to(x: jax.Array, before: PartitionSpec, after: PartitionSpec) -> jax.Array:
    """`x`, moved from one layout to another; its gradient moves back."""
    # Both constraints are needed: with the second alone, XLA gathers every layer before the loop, or computes a
    # gradient by columns, for which every device needs all tokens.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, before), after)


def make_array(
    shape: tuple[int, ...], sharding: Sharding, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array laid out as `sharding` says; calls `part` once for each part, even if several devices hold it."""
    parts: dict[str, np.ndarray] = {}

    def cached(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "JAX gives None only for arrays without a shape"
        key = str(index)
        if key not in parts:
            parts[key] = part(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, cached)


def named_leaves(tree: object) -> dict[str, Any]:
    """The leaves by name, such as `decoder/norm/scale`; optimisers, checkpoints and messages use these names."""
    # A parameter is a node with one leaf, which adds nothing to the name.
    return {name: jax.tree.leaves(node)[0] for name, node in _named_nodes(tree).items()}


def _named_nodes(tree: object) -> dict[str, Any]:
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}


def leaves_for_update(model: nnx.Module) -> dict[str, jax.Array]:
    """The `named_leaves` of a model or its gradient, each laid out as its optimiser state."""

    def place(variable: nnx.Variable) -> jax.Array:
        if _sharded(variable) != "optimizer" or jax.sharding.get_abstract_mesh().empty:
            return variable[...]  # it has that layout already
        return _from_to(variable[...], partition_spec(*_axes(variable)), _update_spec(variable))

    return {name: place(variable) for name, variable in _named_nodes(model).items()}


def _update_spec(variable: nnx.Variable) -> PartitionSpec:
    return (partition_spec if _sharded(variable) == "none" else sharded_spec)(*_axes(variable))


def with_leaves(tree: Tree, named: Mapping[str, Any]) -> Tree:
    """`tree` with its leaves replaced by those in `named`, the inverse of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in named_leaves(tree)])


def optimizer_shardings(opt_state: Tree, model: nnx.Module, mesh: Mesh) -> Tree:
    """The shardings of an optimiser's state for `named_leaves(model)`, leaf by leaf.

    The state of a parameter has the parameter's layout, in smaller parts (`sharded_spec`) if `mesh.sharded` says so,
    and without the mesh axis of a dimension that Adafactor averages away. All other state is replicated.
    """
    variables = _named_nodes(model)

    def sharding(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        owners = [variables[key.key] for key in path if isinstance(key, DictKey) and key.key in variables]
        fields = [key.name for key in path if isinstance(key, GetAttrKey)]
        return NamedSharding(mesh, _statistic_spec(owners[-1], fields[-1], leaf.shape) if owners else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, in order.

    They need not be adjacent, because a pod's mesh follows its network. Processes that divide weights over `model` hold
    the same rows.
    """
    sharding = NamedSharding(mesh, partition_spec("batch"))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in held if index for row in range(*index[0].indices(batch_size))})


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch on the mesh, from the rows that this process has read (`process_rows`)."""
    sharding = NamedSharding(mesh, partition_spec("batch"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _statistic_spec(variable: nnx.Variable, field: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The mesh axes of an optimiser's statistic of a parameter, which Adafactor keeps under the name `field`."""
    spec, whole = list(_update_spec(variable)), variable.shape
    first = 1 if _axes(variable)[:1] == ("layer",) else 0
    if field in ("v_row", "v_col") and len(whole) > first + 1:
        # v_row is a mean over the largest dimension of a layer, v_col over the second largest. Argsort, as in optax,
        # decides between equal dimensions.
        averaged = first + int(np.argsort(whole[first:])[-1 if field == "v_row" else -2])
        spec, whole = spec[:averaged] + spec[averaged + 1 :], whole[:averaged] + whole[averaged + 1 :]
    # For a statistic that it does not keep, Adafactor stores one number, which every device holds.
    return PartitionSpec(*spec) if shape == whole else PartitionSpec()
