"""Which arrays of a checkpoint are which parameters: in any format, and for a run of the same or another model."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from switchjax.config import Config, UserError
from switchjax.config.formats import FORMAT, format_of
from switchjax.models.parameter_paths import names_by_layer, parameter_paths

_log = logging.getLogger(__name__)

_LISTED = 3
"""Names of one kind that a message lists."""


class StoredArray(NamedTuple):
    """Where a checkpoint holds an array.

    Attributes:
        name: of the stored array.
        stored_shape: of the stored array.
        layer: the array's position along the first axis of the stored one; None: it is all of it.
    """

    name: str
    stored_shape: tuple[int, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array itself."""
        return self.stored_shape if self.layer is None else self.stored_shape[1:]


StoredArrays = dict[str, StoredArray]
"""Arrays by their names in one format."""
Sources = dict[str, list[StoredArray | None]]
"""Array in memory -> where each of its layers is stored, or all of it if it has none; None: nowhere."""


def _from_0(config: Config, arrays: StoredArrays) -> StoredArrays:
    """Format 0 stores stacks of layers as they were in memory."""
    paths = parameter_paths(config, arrays, ("runs", "blocks"))
    return {
        name: array._replace(layer=position if paths[stack].layers else None)
        for stack, array in arrays.items()
        for position, name in enumerate(paths[stack].by_layer)
    }


MIGRATIONS: dict[int, Callable[[Config, StoredArrays], StoredArrays]] = {0: _from_0}
"""Older format -> what gives arrays their names in the next format; the config is the checkpoint's."""


def current_names(arrays: Mapping[str, Any], saved: Mapping[str, Any]) -> StoredArrays:
    """The arrays of a checkpoint under the names of this version's format.

    Args:
        arrays: what has their shapes, under the names in the checkpoint.
        saved: the checkpoint's config, as it is saved.

    Raises:
        UserError: as `Config.from_saved`.
    """
    stored = {name: StoredArray(name, tuple(array.shape)) for name, array in arrays.items()}
    for number in range(format_of(saved), FORMAT):
        stored = MIGRATIONS[number](Config.from_saved(saved), stored)
    return stored


def parameters(stored: StoredArrays) -> StoredArrays:
    """The arrays of a checkpoint's model, under their names in it."""
    model = "model/"
    return {name.removeprefix(model): array for name, array in stored.items() if name.startswith(model)}


def _layers(config: Config, leaves: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Each array in memory, its names by layer, and the shape of a layer."""
    for name, path in parameter_paths(config, leaves).items():
        shape = leaves[name].shape
        yield name, path.by_layer, shape[1:] if path.layers else shape


def exact_sources(config: Config, leaves: Mapping[str, Any], stored: StoredArrays, found: str) -> Sources:
    """Where a checkpoint of this very model holds its arrays.

    Args:
        config: of the run.
        leaves: the arrays in memory, or their shapes.
        stored: the arrays of the checkpoint.
        found: what messages call the checkpoint.

    Raises:
        UserError: naming the first array that is missing, has another shape or is one too many.
    """
    sources: Sources = {}
    for name, layers, shape in _layers(config, leaves):
        for layer in layers:
            if layer not in stored:
                raise UserError(f"{found} does not fit the config: it has no {layer}")
            if stored[layer].shape != shape:
                raise UserError(
                    f"{found} does not fit the config: {layer} is {stored[layer].shape} there and {shape} here"
                )
        sources[name] = [stored[layer] for layer in layers]
    surplus = min(stored.keys() - names_by_layer(config, leaves), default=None)
    if surplus is not None:
        raise UserError(f"{found} does not fit the config: it has {surplus} besides")
    return sources


def matching_sources(
    config: Config, leaves: Mapping[str, Any], stored: StoredArrays, saved: Config, found: str
) -> Sources:
    """Where the checkpoint of another model holds parameters of the same names; logs what is taken, left and made new.

    Args:
        config: of the run.
        leaves: the model's parameters in memory, or their shapes.
        stored: the parameters of the checkpoint.
        saved: the checkpoint's config.
        found: what messages call the checkpoint.

    Raises:
        UserError: naming the first parameter that has another shape, or if there is none of the same name.
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
    """The numbers, as `section.key=value`, that describe another model's arrays and are others in `config`."""
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
