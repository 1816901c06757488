"""The weights of a config's model as its modules make them, and what a training sequence does with each.

Nothing is allocated or compiled: the modules are traced for their shapes, and the forward pass for its matrix products
(`switchjax.accounting.matmuls`). A layer or router from anywhere is accounted for without an edit here.
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
    """A parameter of the model; one that stands in repeated layers is stacked over them."""

    name: str
    """As `named_leaves` has it."""
    stack: str
    """The stack of layers that it stands in; empty before and after these."""
    layers: int
    """How many layers it is stacked over, 1 outside of them."""
    axes: tuple[str | None, ...]
    """Logical axes in one layer, as `AXIS_RULES` names them."""
    shape: tuple[int, ...]
    """Sizes of the axes."""
    dtype: np.dtype
    trained: bool
    """The gradient trains it. What is not trained (tables, balancing biases, averages) is state and no parameter."""
    active: int
    """Numbers that a token meets, in all layers: those of the experts that it is sent to, or all."""
    computed_flops: int
    """FLOPs of a sequence in its matrix products, those of empty slots included."""

    @property
    def part(self) -> str:
        """embeddings, positions, patches, attention, feed_forward, experts, routers, lstm, norms, logits, or other."""
        if "expert" in self.axes:
            return "experts"
        places = set(self.name.split("/"))
        return next((part for part, names in _PARTS if places & names), "other")

    @property
    def size(self) -> int:
        """Numbers in it, in all layers."""
        return prod(self.shape) * self.layers

    @property
    def vectors(self) -> int:
        """Vectors of a sequence that one layer multiplies by it, each by one expert's share."""
        return self.computed_flops // (2 * self.size // self.axis("expert"))

    @property
    def slot_numbers(self) -> int:
        """Numbers in a sequence's slots on their way to this weight of one layer's experts, or from it.

        A gate reads the slots that have come to w_in; PEER's neurons, rows of a table, have no slots.
        """
        if "expert" not in self.axes or len(self.axes) < 3 or self.name.endswith("/w_gate"):
            return 0
        sizes = zip(self.axes, self.shape, strict=True)
        return self.vectors * sum(size for axis, size in sizes if axis not in ("expert", "mlp"))

    def axis(self, name: str) -> int:
        """The size of an axis, 1 without such an axis."""
        return self.shape[self.axes.index(name)] if name in self.axes else 1


_PARTS = (
    ("routers", {"router", "mixing", "mixing_bias", "sub_keys", "norm_scale", "norm_bias", "phi", "phi_scale"}),
    ("norms", {"norm", "self_norm", "cross_norm", "ff_norm", "extra_norm"}),
    ("attention", {"self_attention", "cross_attention"}),
    ("routers", {"query"}),  # PEER's, as attention's have been found
    ("lstm", {"lstm"}),
    ("feed_forward", {"w_in", "w_gate", "w_out", "b_in", "b_out"}),
    ("embeddings", {"embedding"}),
    ("positions", {"positions", "class_token", "bias"}),
    ("patches", {"patches", "patches_bias"}),
    ("logits", {"logits", "pre_logits", "pre_logits_bias", "head", "head_bias"}),
)
"""Parts with the names on a weight's path that say so; the first that has one."""


@dataclass(frozen=True)
class TracedModel:
    """A model's weights, and what its forward pass multiplies besides."""

    weights: tuple[TracedWeight, ...]
    activation_flops: int
    """FLOPs of a sequence in products without a weight: attention's scores and values, one-hot dispatch."""


@cache
def trace_model(config: Config) -> TracedModel:
    """Traces the model, and its forward pass in training on one micro-batch, on one device.

    Raises:
        UserError: if there is no such model, or if it cannot take such batches.
    """
    rows = config.data.batch_size // config.train.accumulation_steps
    config = replace(
        config,
        # FLOPs are those of any dtype; in float32, attention is no kernel that hides its products, whatever the device.
        model=replace(config.model, dtype="float32"),
        data=replace(config.data, batch_size=rows),
        train=replace(config.train, accumulation_steps=1),
    )
    # On the mesh of a caller, a layer would be traced as one device's share of it.
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
    """Experts that a token meets in the layer of a weight; on average where experts choose or slots mix tokens."""
    moe, layer = config.moe, name.rpartition("/")[0]
    if (phi := leaves.get(f"{name.partition('/experts/')[0]}/phi")) is not None:  # soft MoE: E x P slots a row
        return phi.shape[-2] * phi.shape[-1] / config.stack_lengths[name.split("/")[0]]
    heads = leaves[f"{layer}/query"].shape[-3] if f"{layer}/sub_keys" in leaves else 1  # PEER: each selects K
    chosen = moe.train_capacity_factor if moe.router == "expert_choice" else 1
    return round(moe.num_selected_experts * heads * chosen)
