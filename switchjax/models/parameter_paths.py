"""Names of parameters by layer, such as `encoder/3/ff/experts/w_in`, which do not depend on how memory stacks layers.

For `lax.scan`, memory holds a parameter of several layers as one array, `encoder/scans/0/blocks/1/ff/experts/w_in`. The
layers in it depend on the depth and the pattern of the whole stack. So everything that outlives a run (checkpoints,
weights from and to Hugging Face, messages) names parameters by layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from switchjax.config import Config
from switchjax.models.scan_periods import scan_periods

_ATTRIBUTES = ("scans", "blocks")
"""The attributes of `Stack` with its scanned periods and of `Period` with its layers."""


@dataclass(frozen=True)
class ParameterPath:
    """The layers that an array in memory holds."""

    name: str
    """Such as `encoder/{layer}/ff/experts/w_in`, or the name of a parameter that belongs to no layer."""
    layers: tuple[int, ...] = ()
    """Numbers, within their stack, of the layers along the array's first axis; empty without such an axis."""
    num_experts: int = 0
    """Number of experts of each of those layers."""

    @property
    def of_experts(self) -> bool:
        """True if each expert has its own part of the array, along the axis after the axis of layers."""
        return "experts" in self.name.split("/")

    @property
    def by_layer(self) -> tuple[str, ...]:
        """The parameter's name in each layer, or its only name if it belongs to no layer."""
        return tuple(self.name.format(layer=layer) for layer in self.layers) or (self.name,)


def parameter_paths(
    config: Config, names: Iterable[str], attributes: tuple[str, str] = _ATTRIBUTES
) -> dict[str, ParameterPath]:
    """The path of each name of `named_leaves`, of a model or of a tree whose names end with those of a model.

    In an optimiser's state, `mu/encoder/scans/0/blocks/1/ff/w_in` has the path `mu/encoder/{layer}/ff/w_in`. Older
    formats had other `attributes`.
    """
    scanned: dict[tuple[str, ...], tuple[tuple[int, ...], int]] = {}
    for stack in config.model.stacks:
        first = 0
        for scan, (period, repeats) in enumerate(scan_periods(config.layers(stack))):
            end = first + len(period) * repeats
            for block, layer in enumerate(period):
                place = (stack, attributes[0], str(scan), attributes[1], str(block))
                scanned[place] = tuple(range(first + block, end, len(period))), layer.num_experts
            first = end

    def path(name: str) -> ParameterPath:
        parts = tuple(name.split("/"))
        for start in range(len(parts) - 5):
            end = start + 5
            if found := scanned.get(parts[start:end]):
                return ParameterPath("/".join((*parts[: start + 1], "{layer}", *parts[end:])), *found)
        return ParameterPath(name)

    return {name: path(name) for name in names}


def names_by_layer(config: Config, names: Iterable[str]) -> list[str]:
    """The names by layer of arrays with these names in memory."""
    return [layer for path in parameter_paths(config, names).values() for layer in path.by_layer]
