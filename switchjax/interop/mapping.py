"""Converts parameters from and to the tensors of a table, one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from switchjax.config import Config, UserError
from switchjax.interop.family import LOGITS, VECTORS, Table
from switchjax.interop.layouts import Layout, axis_sizes
from switchjax.interop.tensors import TensorFolder
from switchjax.models.parameter_paths import ParameterPath, parameter_paths
from switchjax.parallel.sharding import make_array

_LISTED = 5
"""Largest number of names that a message lists."""


@dataclass(frozen=True)
class Entry:
    """A parameter, stacked over layers and experts, and the tensors that hold its parts."""

    path: ParameterPath
    """The parameter's layers."""
    theirs: str
    """The tensors' name, with places for layer and expert."""
    layout: Layout
    """The layout of each tensor."""
    shape: tuple[int, ...]
    """The parameter's shape."""
    ids: Int[np.ndarray, "V"] | None
    """If the tensors' first axis is the vocabulary: their id for each of ours; None if equal."""

    @property
    def _leading(self) -> tuple[int, ...]:
        """Sizes of the parameter's axes of layers and of experts."""
        return self.shape[: bool(self.path.layers) + self.path.of_experts]

    def tensors(self) -> dict[tuple[int, ...], str]:
        """Position along the axes of layers and of experts -> name of the tensor."""
        layers, names = self.path.layers or (0,), {}
        for index in np.ndindex(*self._leading):
            layer, expert, *_ = (*index, 0, 0)
            names[index] = self.theirs.format(layer=layers[layer], expert=expert)
        return names

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part of one layer or one expert."""
        return self.shape[len(self._leading) :]

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return self.layout.their_shape(self.part_shape)

    def read(self, source: TensorFolder, index: tuple[slice, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
        """Reads the part `index` of the parameter, from only the tensors that hold it."""
        count = len(self._leading)
        ranges = [range(size)[part] for size, part in zip(self._leading, index[:count], strict=True)]
        sizes = [len(range(size)[part]) for size, part in zip(self.shape, index, strict=True)]
        names, out = self.tensors(), np.empty(sizes, dtype)
        for place in np.ndindex(*sizes[:count]):
            name = names[tuple(numbers[i] for numbers, i in zip(ranges, place, strict=True))]
            tensor = source.read(name) if self.ids is None else source.read(name)[self.ids]
            out[place] = self.layout.to_ours(tensor)[index[count:]]
        return out

    def split(self, leaf: jax.Array) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        """The name and content of each tensor."""
        for index, name in self.tensors().items():
            tensor = self.layout.to_theirs(np.asarray(leaf[index]))
            if self.ids is not None:
                ours, tensor = tensor, np.empty_like(tensor)
                tensor[self.ids] = ours
            yield name, tensor


def match(
    config: Config, table: Table, shapes: Mapping[str, Any], ids: Int[np.ndarray, "V"] | None = None
) -> dict[str, Entry]:
    """Name of a parameter -> its entry, for all parameters in `shapes`; `ids` as in `Entry`.

    Raises:
        UserError: names the parameters that the table lacks.
    """
    rules, sizes = {rule.ours: rule for rule in table.rules}, axis_sizes(config.model)
    paths = parameter_paths(config, shapes)
    if unknown := [layer for path in paths.values() if path.name not in rules for layer in path.by_layer]:
        raise UserError(f"Hugging Face's model has no place for {_some(unknown)}")

    def entry(name: str, path: ParameterPath) -> Entry:
        rule = rules[path.name]
        of_vocabulary = rule.layout in (VECTORS, LOGITS)
        return Entry(path, rule.theirs, Layout(rule.layout, sizes), shapes[name].shape, ids if of_vocabulary else None)

    return {name: entry(name, path) for name, path in paths.items()}


def check_tensors(entries: Mapping[str, Entry], table: Table, source: TensorFolder) -> None:
    """Raises a `UserError` that names tensors that are missing, unknown, of another shape, or unequal copies."""
    wanted = {name: entry.their_shape for entry in entries.values() for name in entry.tensors().values()}
    there, copies = source.names, {name: of for name, of in table.copies.items() if name in source.names}
    shapes = {name: source.shape(name) for name in wanted if name in there}
    problems = {
        "missing": [name for name in wanted if name not in there],
        "of another shape": [
            f"{name} {shape} for {wanted[name]}" for name, shape in shapes.items() if shape != wanted[name]
        ],
        "unknown": sorted(there - set(wanted) - set(copies) - set(table.unused)),
    }
    if not problems["missing"]:
        unequal = [name for name, of in copies.items() if not np.array_equal(source.read(name), source.read(of))]
        problems["not the copies that they should be"] = unequal
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"the tensors do not fit config.json: {'; '.join(found)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def load(entry: Entry, source: TensorFolder, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Loads a parameter; each device receives its own part, and the host never holds the whole model."""
    array = make_array(entry.shape, sharding, lambda index: entry.read(source, index, dtype))
    # Wait, or an unfinished transfer would keep the host's copy while the next parameter is read.
    return jax.block_until_ready(array)
