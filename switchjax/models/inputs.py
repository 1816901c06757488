"""What the layers of a stack see besides the residual stream, and what they report."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from switchjax.moe.losses import RoutingMetrics
from switchjax.moe.routing import RoutingReport

Reports = dict[str, RoutingReport]
"""The reports of a model's layers with experts, by the names of these modules as in `named_leaves`, such as
`decoder/scans/0/blocks/1/ff`. Arrays have a first axis of layers where modules are stacked."""


def metrics_by_layer(reports: Reports) -> dict[str, list[RoutingMetrics]]:
    """Stack -> the metrics of its layers that count choices, first to last; the encoder comes before the decoder."""
    rows: dict[tuple[str, int, str], RoutingMetrics] = {}
    for name, report in reports.items():
        for i, layer in enumerate(report.layers if report.metrics is not None else ()):
            rows[stack_of(name), layer, name] = jax.tree.map(lambda values, i=i: values[i], report.metrics)
    stacks = sorted({stack for stack, *_ in rows}, reverse=True)
    return {stack: [rows[place] for place in sorted(rows) if place[0] == stack] for stack in stacks}


def stack_of(name: str) -> str:
    """The stack of a layer by its report's name: encoder or decoder."""
    return name.partition("/")[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossInputs:
    """What the cross-attention of a decoder attends to."""

    encoded: Any
    """`Float[Array, "B M D"]`; None where each layer's cache has the keys and values of it."""
    mask: Bool[Array, "B 1 L M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackInputs:
    """What every layer of a stack sees; N keys, those of the L tokens themselves or of a cache."""

    tokens: Int[Array, "B L"] | None
    """Vocabulary ids; None for images."""
    segments: Int[Array, "B L"]
    self_mask: Bool[Array, "B 1 L N"]
    self_bias: Float[Array, "#B H L N"] | None
    positions: Int[Array, "B L"] | None
    """By which queries and keys are rotated; None: they are not."""
    cross: CrossInputs | None
    slots: Int[Array, "B L"] | None = None
    """Where in the cache the tokens' keys and values go, N for padding; None without a cache."""

    @property
    def token_mask(self) -> Bool[Array, "B L"]:
        """False for padding."""
        return self.segments > 0
