"""Turns dense models into models with experts, and removes the experts that are used least."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import Config, UserError
from switchjax.models.families import build
from switchjax.models.inputs import metrics_by_layer
from switchjax.models.model import Batch, Model
from switchjax.models.parameter_paths import ParameterPath, parameter_paths
from switchjax.parallel.sharding import named_leaves, with_leaves

Usage = Mapping[str, Float[np.ndarray, "layers E"]]
"""Stack -> number of choices of each expert in each layer with experts."""

_UNPRUNABLE = {
    "moe.router=hash": "identifies experts by their numbers",
    "moe.router=hierarchical": "identifies experts by their numbers",
    "moe.router=expert_choice": "gives all experts equally many tokens",
    "model.pattern=peer": "does not count which experts are used",
    "model.pattern=switch_attention": "has two routers in each layer, each with its own experts",
}
"""Router or kind of layer -> the reason why it cannot keep only its most used experts."""


def upcycle(dense: Model, dense_config: Config, config: Config, key: PRNGKeyArray, noise: float = 0.0) -> Model:
    """A model whose experts are copies of their layer's dense feed-forward network (Komatsuzaki et al. 2022).

    Routers are new; everything else is the dense model's. If no token is dropped and a token's gates sum to 1 (router
    top_k with normalised gates, K > 1), it computes the same as the dense model until training makes experts differ.

    Args:
        dense: the model to start from.
        dense_config: its config.
        config: the same config with layers of kind moe.
        key: for routers and noise.
        noise: standard deviation of noise on the experts' weights, relative to the deviation of each matrix.

    Raises:
        UserError: names the first parameter that the dense model lacks or has in another shape; or for a bad noise.
    """
    if not 0 <= noise < math.inf:
        raise UserError(f"noise must be a number of at least 0, got {noise}")
    if config.model.experts_activation != dense_config.model.activation:
        raise UserError(
            f"experts of activation {config.model.experts_activation} cannot be copies of networks of "
            f"model.activation={dense_config.model.activation}"
        )
    fresh = named_leaves(build(config, key))  # under jit, XLA drops all of it except the routers
    parts = _by_layer(dense, dense_config)
    leaves = {}
    for number, (name, path) in enumerate(parameter_paths(config, fresh).items()):
        if "router" in name.split("/"):
            leaves[name] = fresh[name]
            continue
        copied = _copy(path, parts, fresh[name])
        leaves[name] = _disturb(copied, noise, jax.random.fold_in(key, number)) if path.of_experts else copied
    return with_leaves(jax.eval_shape(lambda: build(config, key)), leaves)


def _by_layer(model: Model, config: Config) -> dict[str, Array]:
    """The parameters by layer."""
    leaves = named_leaves(model)
    parts: dict[str, Array] = {}
    for name, path in parameter_paths(config, leaves).items():
        layers = leaves[name] if path.layers else [leaves[name]]
        parts |= dict(zip(path.by_layer, layers, strict=True))
    return parts


def _copy(path: ParameterPath, parts: Mapping[str, Array], like: Array) -> Array:
    """The dense model's parameters of the same layers, repeated for each expert."""
    sources = [name.replace("/ff/experts/", "/ff/") for name in path.by_layer]
    if missing := next((source for source in sources if source not in parts), None):
        raise UserError(f"the dense model has no {missing}")
    shape = like.shape[bool(path.layers) + path.of_experts :]
    if other := next((source for source in sources if parts[source].shape != shape), None):
        raise UserError(f"{other} is {parts[other].shape} in the dense model and {shape} here")
    if not path.layers:
        return parts[path.name].astype(like.dtype)
    stacked = jnp.stack([parts[source] for source in sources]).astype(like.dtype)
    return jnp.broadcast_to(stacked[:, None], like.shape) if path.of_experts else stacked


def _disturb(experts: Array, noise: float, key: PRNGKeyArray) -> Array:
    if not noise:
        return experts
    deviation = jnp.std(experts, axis=tuple(range(2, experts.ndim)), keepdims=True)
    draw = jax.random.normal(key, experts.shape, experts.dtype)
    return experts + jnp.asarray(noise, experts.dtype) * deviation * draw


def expert_usage(model: Model, config: Config, batches: Iterable[Batch]) -> Usage:
    """The number of choices that fall on each expert over some batches, before capacity.

    Raises:
        UserError: if there are no batches.
    """

    @jax.jit
    def loads(model: Model, batch: Batch) -> dict[str, Array]:
        _, reports = model(batch, None)
        by_layer = metrics_by_layer(reports).items()
        return {stack: jnp.stack([metrics.expert_load for metrics in layers]) for stack, layers in by_layer}

    totals = [jax.device_get(loads(model, batch)) for batch in batches]
    if not totals:
        raise UserError(f"no corpus has anything in its {config.evaluate.split} split")
    return {stack: np.sum([total[stack] for total in totals], axis=0) for stack in config.model.stacks}


def pruned_config(config: Config, num_experts: int) -> Config:
    """The config with `num_experts` experts in every layer.

    Raises:
        UserError: if there are fewer experts, a token selects more, or the router cannot be pruned.
    """
    if not config.model.has_experts:
        raise UserError("model.pattern names no layer with experts: there is nothing to prune")
    used = {f"moe.router={config.moe.router}", *(f"model.pattern={kind}" for kind in config.model.pattern)}
    for setting, reason in _UNPRUNABLE.items():
        if setting in used:
            raise UserError(f"{setting} {reason}: it cannot be pruned")
    if config.moe.experts_per_layer or num_experts > config.moe.num_experts:
        raise UserError(f"cannot keep {num_experts} of the experts of every layer: there are {config.moe.num_experts}")
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=num_experts))


def prune(model: Model, config: Config, usage: Usage, num_experts: int) -> Model:
    """The model with only the `num_experts` most used experts of each layer, of config `pruned_config`.

    A token whose expert is removed goes to the best expert that is left.
    """
    pruned = pruned_config(config, num_experts)
    kept = {stack: _kept_experts(config, stack, counts, num_experts) for stack, counts in usage.items()}
    smaller = jax.eval_shape(lambda: build(pruned, jax.random.key(0)))
    shapes, leaves = named_leaves(smaller), named_leaves(model)
    paths = parameter_paths(config, leaves)
    selected = {name: _select(paths[name], leaf, shapes[name].shape, kept) for name, leaf in leaves.items()}
    return with_leaves(smaller, selected)


def _kept_experts(
    config: Config, stack: str, counts: Float[np.ndarray, "layers E"], num_experts: int
) -> dict[int, Int[np.ndarray, "_"]]:
    """Layer of the stack -> its most used experts, in ascending order; among equals, the first."""
    best = np.sort(np.argsort(-counts, axis=-1, kind="stable")[:, :num_experts], axis=-1)
    routed = [number for number, layer in enumerate(config.layers(stack)) if layer.num_experts]
    return dict(zip(routed, best, strict=True))


def _select(
    path: ParameterPath, leaf: Array, shape: tuple[int, ...], kept: Mapping[str, Mapping[int, Int[np.ndarray, "_"]]]
) -> Array:
    """The part of the kept experts, along the axis whose size differs from `shape`; all of it if no axis does."""
    axis = next((axis for axis, (old, new) in enumerate(zip(leaf.shape, shape, strict=True)) if old != new), None)
    if axis is None:
        return leaf
    stack, *_ = path.name.split("/")
    chosen = jnp.stack([jnp.asarray(kept[stack][layer]) for layer in path.layers])
    return jax.vmap(lambda part, experts: jnp.take(part, experts, axis=axis - 1))(leaf, chosen)
