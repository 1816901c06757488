"""Where a parameter stands in its model, layer by layer, however the layers are stacked for `lax.scan`."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from switchjax.config import Config
from switchjax.models.scan_periods import find_runs

_STACKED = re.compile(r"(?P<stack>\w+)/runs/(?P<run>\d+)/blocks/(?P<block>\d+)/(?P<rest>.+)")


@dataclass(frozen=True)
class Place:
    """A parameter's name without regard to runs, and what its leading axes count.

    Attributes:
        name: such as `encoder/{layer}/ff/experts/w_in`; the layer is that of the stack.
        layers: those along its first axis; empty for a parameter that is not of a layer.
        num_experts: along the axis after that; 0 for a parameter that is not of an expert.
    """

    name: str
    layers: tuple[int, ...] = ()
    num_experts: int = 0

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes that count layers and experts."""
        return tuple(size for size in (len(self.layers), self.num_experts) if size)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """All positions along those axes, in order."""
        return itertools.product(*map(range, self.leading))

    def numbers(self, index: tuple[int, ...]) -> dict[str, int]:
        """Which layer and expert stand at a position."""
        if not index:
            return {}
        return dict(zip(("layer", "expert"), (self.layers[index[0]], *index[1:]), strict=False))


def place_of(config: Config, name: str) -> Place:
    """The place of a parameter of `named_leaves(model)`."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return Place(name)
    runs = find_runs(config.layers(match["stack"]))
    run, block = int(match["run"]), int(match["block"])
    first = sum(len(earlier.period) * earlier.repeats for earlier in runs[:run]) + block
    period, repeats = runs[run]
    layers = tuple(first + i * len(period) for i in range(repeats))
    of_experts = "experts" in match["rest"].split("/")
    return Place(f"{match['stack']}/{{layer}}/{match['rest']}", layers, period[block].num_experts if of_experts else 0)
