"""Maps the arrays of a checkpoint, in any format, to those of a run of the same or another model."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from switchjax.config import Config, UserError
from switchjax.config.checks import require
from switchjax.config.formats import FORMAT, format_of
from switchjax.models.parameter_paths import names_by_layer, parameter_paths

_log = logging.getLogger(__name__)

_LISTED = 3
"""The most names that one message lists."""


class StoredArray(NamedTuple):
    """An array of a checkpoint: the stored array `name` or, with `layer`, that position along its first axis."""

    name: str
    stored_shape: tuple[int, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array itself."""
        return self.stored_shape if self.layer is None else self.stored_shape[1:]


StoredArrays = dict[str, StoredArray]
"""Name in one format -> array."""
Sources = dict[str, list[StoredArray | None]]
"""Array in memory -> the stored array of each of its layers, or of the whole; None for a layer that is not stored."""


def _from_0(config: Config, arrays: StoredArrays) -> StoredArrays:
    """Divides the stacks of layers, which format 0 stores as they were in memory."""
    paths = parameter_paths(config, arrays, ("runs", "blocks"))
    return {
        name: array._replace(layer=position if paths[stack].layers else None)
        for stack, array in arrays.items()
        for position, name in enumerate(paths[stack].by_layer)
    }


MIGRATIONS: dict[int, Callable[[Config, StoredArrays], StoredArrays]] = {0: _from_0}
"""Older format -> function that gives arrays their names in the next format, from the checkpoint's own config."""


def current_names(arrays: Mapping[str, Any], saved: Mapping[str, Any]) -> StoredArrays:
    """The arrays of a checkpoint under their names in the current format.

    `arrays` have their shapes and names as in the checkpoint, whose saved config is `saved`. Raises what
    `Config.from_saved` raises.
    """
    stored = {name: StoredArray(name, tuple(array.shape)) for name, array in arrays.items()}
    for number in range(format_of(saved), FORMAT):
        stored = MIGRATIONS[number](Config.from_saved(saved), stored)
    return stored


def parameters(stored: StoredArrays) -> StoredArrays:
    """The arrays of a checkpoint's model, under their names in the model."""
    model = "model/"
    return {name.removeprefix(model): array for name, array in stored.items() if name.startswith(model)}


def _layers(config: Config, leaves: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The name of each array in memory, its names by layer, and the shape of a layer."""
    for name, path in parameter_paths(config, leaves).items():
        shape = leaves[name].shape
        yield name, path.by_layer, shape[1:] if path.layers else shape


def exact_sources(config: Config, leaves: Mapping[str, Any], stored: StoredArrays, found: str) -> Sources:
    """The sources of `leaves` (arrays or shapes) in a checkpoint of the same model, which messages call `found`.

    Raises:
        UserError: naming the first array that is missing, has another shape or is unknown to the model.
    """
    sources: Sources = {}
    misfit = f"{found} does not fit the config"
    for name, layers, shape in _layers(config, leaves):
        for layer in layers:
            require(layer in stored, f"{misfit}: it has no {layer}")
            there = stored[layer].shape
            require(there == shape, f"{misfit}: {layer} is {there} there and {shape} here")
        sources[name] = [stored[layer] for layer in layers]
    for surplus in sorted(stored.keys() - names_by_layer(config, leaves)):
        raise UserError(f"{misfit}: the model has no {surplus}")
    return sources


def matching_sources(
    config: Config, leaves: Mapping[str, Any], stored: StoredArrays, saved: Config, found: str
) -> Sources:
    """The sources of those `leaves` that another model's checkpoint, with the config `saved`, has under the same names.

    Logs which parameters it takes from the checkpoint, which it leaves there, and which stay new.

    Raises:
        UserError: naming the first parameter that has another shape, or if no name is the same.
    """
    sources: Sources = {}
    taken: list[str] = []
    new: list[str] = []
    for name, layers, shape in _layers(config, leaves):
        for layer in layers:
            if layer in stored and stored[layer].shape != shape:
                sizes = _other_sizes(saved, config)
                raise UserError(
                    f"cannot start from {found}: {layer} is {stored[layer].shape} there and {shape} here"
                    + (f"; its sizes are {', '.join(sizes)}: set those" if sizes else "")
                )
            (taken if layer in stored else new).append(layer)
        sources[name] = [stored.get(layer) for layer in layers]
    if not taken:
        raise UserError(f"cannot start from {found}: it has none of the model's parameters, such as {_some(new)}")
    left = [name for name in stored if name not in set(taken)]
    _log.info("takes %d parameters of %s: %s", len(taken), found, _some(taken))
    _log.info("leaves %d parameters of %s: %s", len(left), found, _some(left))
    _log.info("makes %d parameters new: %s", len(new), _some(new))
    return sources


def _other_sizes(saved: Config, config: Config) -> list[str]:
    """The sizes of a saved model that differ in `config`, as `section.key=value`."""
    was, now = saved.to_dict(), config.to_dict()
    return [
        f"{section}.{key}={value}"
        for section in ("model", "moe")
        for key, value in was[section].items()
        if type(value) in (int, tuple) and value != now[section].get(key)
        if key != "pattern" and not key.endswith("_layers")
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "") or "none"
