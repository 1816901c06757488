"""Names of parameters by layer, such as `encoder/3/ff/experts/w_in`: one name however memory stacks the layers.

For `lax.scan`, memory holds the parameter of several layers as one array, `encoder/scans/0/blocks/1/ff/experts/w_in`.
Which layers those are depends on the depth and the pattern of the whole stack. Whatever outlives a run (checkpoints,
weights from and to Hugging Face, messages) names parameters by layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from switchjax.config import Config
from switchjax.models.scan_periods import scan_periods

_ATTRIBUTES = ("scans", "blocks")
"""How `Stack` calls its scanned periods, and `Period` its layers."""


@dataclass(frozen=True)
class ParameterPath:
    """The layers that an array in memory holds.

    Attributes:
        name: such as `encoder/{layer}/ff/experts/w_in`, or that of a parameter that belongs to no layer.
        layers: the numbers, within their stack, of the layers along the array's first axis; empty without such an axis.
        num_experts: of each of those layers.
    """

    name: str
    layers: tuple[int, ...] = ()
    num_experts: int = 0

    @property
    def of_experts(self) -> bool:
        """Whether each expert has such a parameter of its own, along the axis after that of layers."""
        return "experts" in self.name.split("/")

    @property
    def by_layer(self) -> tuple[str, ...]:
        """The parameter's name in each layer; its only name if it belongs to no layer."""
        return tuple(self.name.format(layer=layer) for layer in self.layers) or (self.name,)


def parameter_paths(
    config: Config, names: Iterable[str], attributes: tuple[str, str] = _ATTRIBUTES
) -> dict[str, ParameterPath]:
    """The path of each name of `named_leaves`: of a model, or of a tree whose names end with a model's.

    In an optimiser's state, `mu/encoder/scans/0/blocks/1/ff/w_in` has the path `mu/encoder/{layer}/ff/w_in`.

    Args:
        config: of the model.
        names: of arrays in memory.
        attributes: what stacks call their scanned periods, and these their layers.
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
    """The names in each layer of what has these names in memory."""
    return [layer for path in parameter_paths(config, names).values() for layer in path.by_layer]
