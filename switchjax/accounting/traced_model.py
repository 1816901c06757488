"""Traces a config's model: its weights, and what a training sequence computes with each.

It allocates and compiles nothing: it traces the modules for their shapes and the forward pass for its matrix products
(`switchjax.accounting.matmuls`). So it covers any new layer or router without an edit here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx

from switchjax.accounting.matmuls import matmuls
from switchjax.config import Config
from switchjax.models.families import FAMILIES, build
from switchjax.parallel.sharding import is_variable, named_leaves


@dataclass(frozen=True)
class TracedWeight:
    """A parameter of the model, stacked over the layers that repeat it."""

    name: str
    """The name that `named_leaves` gives it."""
    stack: str
    """The stack of its layers, or an empty string outside of stacks."""
    layers: int
    """Number of layers that it is stacked over; 1 outside of stacks."""
    axes: tuple[str | None, ...]
    """Logical axes in one layer, with the names of `AXIS_RULES`."""
    shape: tuple[int, ...]
    """Sizes of the axes."""
    dtype: np.dtype
    trained: bool
    """True if the gradient trains it. Tables, balancing biases and averages are state, not parameters."""
    active: int
    """Numbers that a token uses in all layers: those of its selected experts, or all."""
    computed_flops: int
    """FLOPs of a sequence in its matrix products, including those of empty slots."""

    @property
    def part(self) -> str:
        """The part of the model it belongs to: `experts`, one of `_PARTS`, or `other`."""
        if "expert" in self.axes:
            return "experts"
        places = set(self.name.split("/"))
        return next((part for part, names in _PARTS if places & names), "other")

    @property
    def size(self) -> int:
        """Numbers in all its layers."""
        return prod(self.shape) * self.layers

    @property
    def vectors(self) -> int:
        """Vectors of a sequence that one layer multiplies by it (by one expert's share of it)."""
        return self.computed_flops // (2 * self.size // self.axis("expert"))

    @property
    def slot_numbers(self) -> int:
        """Numbers in a sequence's slots on their way to, or from, this weight of one layer's experts.

        A gate reads the same slots as w_in, so it counts none. PEER's neurons are rows of a table and have no slots.
        """
        if "expert" not in self.axes or len(self.axes) < 3 or self.name.endswith("/w_gate"):
            return 0
        sizes = zip(self.axes, self.shape, strict=True)
        return self.vectors * sum(size for axis, size in sizes if axis not in ("expert", "mlp"))

    def axis(self, name: str) -> int:
        """The size of an axis, or 1 without such an axis."""
        return self.shape[self.axes.index(name)] if name in self.axes else 1


_PARTS = (
    ("routers", {"router", "mixing", "mixing_bias", "sub_keys", "norm_scale", "norm_bias", "phi", "phi_scale"}),
    ("norms", {"norm", "self_norm", "cross_norm", "ff_norm", "extra_norm"}),
    ("attention", {"self_attention", "cross_attention"}),
    ("routers", {"query"}),  # PEER's: the entry above has found attention's
    ("lstm", {"lstm"}),
    ("feed_forward", {"w_in", "w_gate", "w_out", "b_in", "b_out"}),
    ("embeddings", {"embedding"}),
    ("positions", {"positions", "class_token", "bias"}),
    ("patches", {"patches", "patches_bias"}),
    ("logits", {"logits", "pre_logits", "pre_logits_bias", "head", "head_bias"}),
)
"""Parts, and the names on a weight's path that place it there; the first match counts."""


@dataclass(frozen=True)
class TracedModel:
    """A model's weights, and the products of its forward pass without a weight."""

    weights: tuple[TracedWeight, ...]
    activation_flops: int
    """FLOPs of a sequence in products without a weight: attention's scores and values, one-hot dispatch."""


@cache
def trace_model(config: Config) -> TracedModel:
    """Traces the model, and its training forward pass on one micro-batch and one device.

    Raises:
        UserError: if the config has no model, or its model cannot take its batches.
    """
    rows = config.data.batch_size // config.train.accumulation_steps
    config = replace(
        config,
        # FLOPs do not depend on the dtype, but in float32 attention never becomes a kernel, which would hide products.
        model=replace(config.model, dtype="float32"),
        data=replace(config.data, batch_size=rows),
        train=replace(config.train, accumulation_steps=1),
    )
    # Without this, a caller's mesh would make the trace of a layer one device's share of it.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
        batch, key = FAMILIES[config.model.family].batch_shapes(config), jax.eval_shape(lambda: jax.random.key(0))
        found = matmuls(lambda model, batch, key: model(batch, key), model, batch, key)
    flops: Counter[int | None] = Counter()
    for matmul in found:
        flops[matmul.weight] += matmul.flops
    leaves = named_leaves(model)
    variables = zip(leaves, jax.tree.leaves(model, is_leaf=is_variable), strict=True)
    weights = [
        _weight(name, variable, _experts_per_token(config, name, leaves), flops[number] // rows)
        for number, (name, variable) in enumerate(variables)
    ]
    return TracedModel(tuple(weights), flops[None] // rows)


def _weight(name: str, variable: nnx.Variable, experts_per_token: float, computed_flops: int) -> TracedWeight:
    axes, shape, stack, layers = variable.get_metadata("axes"), variable.shape, "", 1
    active, trained = variable.size, variable.get_metadata("trained", True)
    if "expert" in axes:
        active = round(active * experts_per_token / shape[axes.index("expert")])
    if "layer" in axes:
        stack, layers, axes, shape = name.split("/")[0], shape[0], axes[1:], shape[1:]
    return TracedWeight(name, stack, layers, axes, shape, variable.dtype, trained, active, computed_flops)


def _experts_per_token(config: Config, name: str, leaves: Mapping[str, Any]) -> float:
    """Experts that a token uses in the layer of a weight; an average if experts choose or slots mix tokens."""
    moe, layer = config.moe, name.rpartition("/")[0]
    if (phi := leaves.get(f"{name.partition('/experts/')[0]}/phi")) is not None:  # soft MoE: E x P slots a row
        return phi.shape[-2] * phi.shape[-1] / config.stack_lengths[name.split("/")[0]]
    heads = leaves[f"{layer}/query"].shape[-3] if f"{layer}/sub_keys" in leaves else 1  # PEER: each selects K
    chosen = moe.train_capacity_factor if moe.router == "expert_choice" else 1
    return round(moe.num_selected_experts * heads * chosen)
