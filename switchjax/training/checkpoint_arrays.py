"""Converts between the stacks of layers in a run's memory and the arrays of a checkpoint, one for each layer.

The host divides and builds the stacks, from NumPy views of each device's part, so nothing is compiled and no device
holds a layer beside its stack.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Shaped

from switchjax.config import Config
from switchjax.models.parameter_paths import parameter_paths
from switchjax.parallel.sharding import make_array, named_leaves
from switchjax.training.checkpoint_names import Sources, StoredArray

_PART_BYTES = 2**16
"""Smallest share, in bytes, for which devices that hold the same part of an array divide its writing."""
_READ_BYTES = 2**28
"""Bytes that are read at once for each device; a restore needs no other memory beside the state."""

Index = tuple[slice, ...]


class _HostCopy:
    """The part of an array that this process holds, copied to host memory; for CPU devices, a view."""

    def __init__(self, array: jax.Array):
        self._shape = array.shape
        self._shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for shard in array.addressable_shards:
            bounds = self._bounds(shard.index)
            if bounds not in self._shards:  # several devices may hold the same part
                # Copying to pinned memory is fast and NumPy views it; np.asarray(shard.data) would keep a second copy.
                self._shards[bounds] = np.asarray(jax.device_put(shard.data, _on_host(shard.data.sharding)))

    def _bounds(self, index: Index) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True))

    def part(self, layer: int | None, index: Index) -> Shaped[np.ndarray, "..."]:
        """A part of a layer along the first axis, or of the whole array, that lies within the part of one device."""
        wanted = self._bounds(index if layer is None else (slice(layer, layer + 1), *index))
        for bounds, shard in self._shards.items():
            pairs = list(zip(wanted, bounds, strict=True))
            if all(low <= start and stop <= high for (start, stop), (low, high) in pairs):
                within = tuple(slice(start - low, stop - low) for (start, stop), (low, _) in pairs)
                found = np.asarray(shard[within])  # an index into a 0-dimensional array gives a scalar
                return found if layer is None else found.squeeze(0)
        raise KeyError(index)


def unstacked(config: Config, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of `named_leaves` by layer in host memory, laid out so that devices share the writing."""
    arrays = {}
    for stack, path in parameter_paths(config, leaves).items():
        leaf, copy = leaves[stack], _HostCopy(leaves[stack])
        shape = leaf.shape[1:] if path.layers else leaf.shape
        sharding = _sharding_to_write(leaf, shape)
        for position, name in enumerate(path.by_layer):
            layer = position if path.layers else None
            arrays[name] = make_array(shape, sharding, partial(copy.part, layer))
    return arrays


def _sharding_to_write(leaf: jax.Array, shape: tuple[int, ...]) -> Sharding:
    """The sharding of `leaf` or a layer of it, with each large part divided between the devices that hold it."""
    if not isinstance(leaf.sharding, NamedSharding):
        return _on_host(leaf.sharding)
    mesh = leaf.sharding.mesh
    entries = _trailing_spec(leaf.sharding, leaf.ndim, len(shape))
    spec = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    part = list(leaf.sharding.shard_shape(leaf.shape)[leaf.ndim - len(shape) :])
    for axis in mesh.axis_names:
        count = mesh.shape[axis]
        if any(axis in axes for axes in spec) or math.prod(part) * leaf.dtype.itemsize < _PART_BYTES * count:
            continue
        dimension = next((i for i, size in enumerate(part) if size % count == 0), None)
        if dimension is not None:
            spec[dimension] += (axis,)
            part[dimension] //= count
    return _on_host(NamedSharding(mesh, PartitionSpec(*spec)))


def _trailing_spec(sharding: NamedSharding, ndim: int, kept: int) -> PartitionSpec:
    """The mesh axes of the last `kept` of an array's `ndim` dimensions."""
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return PartitionSpec(*spec[ndim - kept :])


def _on_host(sharding: Sharding) -> Sharding:
    """The same sharding, with each device's part in the memory of its host."""
    return sharding if jax.default_backend() == "cpu" else sharding.with_memory_kind("pinned_host")


Wanted = Mapping[str, jax.ShapeDtypeStruct]
"""Name -> shape, dtype and sharding of an array in memory."""


def with_shardings(shapes: Any, shardings: Any) -> Wanted:
    """`named_leaves` of shapes, each with its sharding."""
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for (name, leaf), sharding in zip(named_leaves(shapes).items(), named_leaves(shardings).values(), strict=True)
    }


def read_stacked(
    wanted: Wanted,
    sources: Sources,
    read: Callable[[Wanted], Mapping[str, jax.Array]],
    present: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The `wanted` arrays, stacked as in memory; `read` is called for a few at a time.

    Args:
        wanted: the stacked arrays.
        sources: the stored array of each layer; None: the layer comes from `present`.
        read: reads stored arrays.
        present: the arrays that have layers without a source.
    """
    arrays = {name: present[name] for name in wanted if not any(sources[name])}
    for names in _portions({name: leaf for name, leaf in wanted.items() if name not in arrays}):
        found = [(name, source) for name in names for source in sources[name] if source is not None]
        parts = read({source.name: _to_read(wanted[name], source) for name, source in found})
        for name in names:
            arrays[name] = _stack(wanted[name], sources[name], parts, present.get(name))
    return arrays


def _portions(wanted: Wanted) -> Iterator[list[str]]:
    """Groups of arrays to read at once, by name; the same in all processes."""
    names: list[str] = []
    size = 0
    for name, leaf in wanted.items():
        names.append(name)
        size += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if size >= _READ_BYTES:
            yield names
            names, size = [], 0
    yield names


def _to_read(leaf: jax.ShapeDtypeStruct, source: StoredArray) -> jax.ShapeDtypeStruct:
    """The stored array, laid out so that each device gets its part of `leaf`; on the host if it must be stacked."""
    sharding = leaf.sharding
    if len(source.shape) < len(leaf.shape):
        spec = _trailing_spec(sharding, len(leaf.shape), len(source.shape))
        sharding = NamedSharding(sharding.mesh, spec if source.layer is None else PartitionSpec(None, *spec))
        if sharding.is_fully_replicated:  # one copy serves all devices of the process
            sharding = SingleDeviceSharding(sharding.mesh.local_devices[0])
        sharding = _on_host(sharding)
    return jax.ShapeDtypeStruct(source.stored_shape, leaf.dtype, sharding=sharding)


def _stack(
    leaf: jax.ShapeDtypeStruct,
    sources: list[StoredArray | None],
    parts: Mapping[str, jax.Array],
    present: jax.Array | None,
) -> jax.Array:
    """The array `leaf` from its stored `parts`; layers without a source come from `present`."""
    first = sources[0]
    if first is not None and len(first.shape) == len(leaf.shape):
        return parts[first.name]
    copies = {source.name: _HostCopy(parts[source.name]) for source in sources if source is not None}
    here = None if present is None else _HostCopy(present)
    layers: list[Callable[[Index], np.ndarray]] = []
    for position, source in enumerate(sources):
        if source is not None:
            layers.append(partial(copies[source.name].part, source.layer))
        else:
            assert here is not None, "a layer without a source must be present"
            layers.append(partial(here.part, position))
    return make_array(leaf.shape, leaf.sharding, lambda index: np.stack([layer(index[1:]) for layer in layers]))
