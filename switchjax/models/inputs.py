"""The inputs of a stack's layers besides the residual stream, and their reports."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from switchjax.moe.losses import RoutingMetrics
from switchjax.moe.routing import RoutingReport

Reports = dict[str, RoutingReport]
"""The reports of layers with experts by module name, such as `decoder/scans/0/blocks/1/ff` (as in `named_leaves`).
Arrays have a first axis of layers if modules are stacked."""


def metrics_by_layer(reports: Reports) -> dict[str, list[RoutingMetrics]]:
    """Stack -> the metrics of its layers that count choices, in order; the encoder comes before the decoder."""
    rows: dict[tuple[str, int, str], RoutingMetrics] = {}
    for name, report in reports.items():
        for i, layer in enumerate(report.layers if report.metrics is not None else ()):
            rows[stack_of(name), layer, name] = jax.tree.map(lambda values, i=i: values[i], report.metrics)
    stacks = sorted({stack for stack, *_ in rows}, reverse=True)
    return {stack: [rows[place] for place in sorted(rows) if place[0] == stack] for stack in stacks}


def stack_of(name: str) -> str:
    """The stack, encoder or decoder, of a layer whose report has this name."""
    return name.partition("/")[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossInputs:
    """The inputs of a decoder's cross-attention."""

    encoded: Any
    """The encoder's output, `Float[Array, "B M D"]`; None if each layer's cache has its keys and values."""
    mask: Bool[Array, "B 1 L M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackInputs:
    """The inputs of every layer of a stack; the N keys are those of the L tokens or of a cache."""

    tokens: Int[Array, "B L"] | None
    """Vocabulary ids; None for images."""
    segments: Int[Array, "B L"]
    self_mask: Bool[Array, "B 1 L N"]
    self_bias: Float[Array, "#B H L N"] | None
    positions: Int[Array, "B L"] | None
    """Positions by which queries and keys are rotated; None: they are not rotated."""
    cross: CrossInputs | None
    slots: Int[Array, "B L"] | None = None
    """The slots of the cache for the tokens' keys and values, N for padding; None without a cache."""

    @property
    def token_mask(self) -> Bool[Array, "B L"]:
        """False for padding."""
        return self.segments > 0
