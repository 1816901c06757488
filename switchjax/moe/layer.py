"""The MoE layer: route, dispatch, exchange, experts, exchange, combine, in one `shard_map` island.

Tokens lie over the axes data and expert, in groups that no device shares, so routing never communicates. Bytes cross
devices in two places: each slot's token travels to its expert and the result back (all-to-all over `expert`), and the
experts' tensor-parallel slices add up (all-reduce over `model`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from switchjax.config import MoEConfig, UserError, check_choice
from switchjax.moe.dispatch import DISPATCHERS
from switchjax.moe.expert_parallel import apply_experts, apply_experts_over_mesh, are_sliced, group_keys
from switchjax.moe.ragged import apply_ragged
from switchjax.moe.routers import ROUTERS
from switchjax.moe.routing import RouterSizes, Routing, Tokens, jitter
from switchjax.moe.slots import capacity_of
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import parameter_specs, partition_spec
from switchjax.parallel.stacking import stack

RoutingSums = dict[str, Float[Array, "..."]]
"""Losses and metrics of a layer, summed over tokens (see `switchjax.moe.losses.summarize`), and `Routing.token_values`
as [B, L]."""


def check_router(config: MoEConfig) -> None:
    """Raises a `UserError` unless the router exists and can route by the config."""
    check_choice("moe.router", config.router, ROUTERS)
    known = ROUTERS[config.router].selected
    if known is not None and config.num_selected_experts not in known:
        raise UserError(
            f"moe.router={config.router} selects {' or '.join(map(str, known))} expert(s), "
            f"but moe.num_selected_experts={config.num_selected_experts}"
        )
    if (check := ROUTERS[config.router].check) is not None:
        check(config)


def noncausal_because(config: MoEConfig) -> str | None:
    """Why, in evaluation, what comes after a token can change its experts; None if it cannot.

    Raises:
        UserError: if there is no such router.
    """
    check_choice("moe.router", config.router, ROUTERS)
    if (reason := ROUTERS[config.router].noncausal) is not None:
        return reason
    if config.dropless:
        return None
    if config.fill_order == "batch_prioritized":
        return "batch-prioritised routing lets a later token with a higher gate take a slot"
    if config.no_token_left_behind:
        return "a token sent on to another expert comes after the first choices of later tokens"
    if config.num_selected_experts > 1 and config.fill_order != "token_by_token":
        return "a second choice loses its slot to the first choice of a later token"
    return None


class MoELayer(nnx.Module):
    """E experts behind a router and buffers of `expert_capacity` slots an expert and group.

    The outcome for a token depends on others of its group, as those may fill its expert's buffer; not so where
    `moe.dropless`, but for routers that balance a group in training (base, sinkhorn). All noise is the same on
    every mesh, but for expert dropout where `model` > 1: each slice of d_ff draws its own.

    Args:
        make_expert: makes one expert from a key: a module from [N, D] to [N, D'], called as `expert(x, key)` where the
            key is for dropout; None in evaluation, and where `moe.expert_dropout` is 0. For ragged dispatch, all
            experts, stacked, are called at once as `experts(x, None, matmul)`, where `matmul` is to be used for every
            product with a weight (`switchjax.moe.ragged`).
        d_model: D.
        config: routing, capacity and losses.
        key: for initialisation.
        vocab_size: for routers that go by token ids.
    """

    def __init__(
        self,
        make_expert: Callable[[PRNGKeyArray], nnx.Module],
        d_model: int,
        config: MoEConfig,
        key: PRNGKeyArray,
        vocab_size: int = 0,
    ):
        check_router(config)
        router_key, expert_key = jax.random.split(key)
        self.config = config
        # float32 whatever the model's dtype: selective precision (Switch Transformer, section 2.4).
        sizes = RouterSizes(d_model, config.num_experts, config.num_expert_groups, vocab_size)
        weights = ROUTERS[config.router].weights(sizes, router_key)
        self.router = nnx.Dict(
            {name: nnx.Param(weight.value, axes=weight.axes, update=weight.update) for name, weight in weights.items()}
        )
        self.experts = stack(make_expert, jax.random.split(expert_key, config.num_experts), "expert")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L M"], RoutingSums]:
        """Applies to each token the experts that it is routed to; zeros where it found no slot.

        Args:
            x: tokens; a group is some whole rows, or an even part of one (`MoEConfig.tokens_per_group`).
            token_mask: False for padding.
            key: for routing noise and expert dropout; None in evaluation, which also takes the evaluation's capacity.
            token_ids: in the vocabulary, for routers that go by them.

        Raises:
            UserError: if rows do not divide into groups, or groups not over the mesh.
        """
        size = self.config.tokens_per_group(x.shape[0], x.shape[1])
        groups = x.reshape(-1, size, x.shape[-1])
        mask = token_mask.reshape(-1, size)
        ids = None if token_ids is None else token_ids.reshape(-1, size)
        apply = self._apply_local if jax.sharding.get_abstract_mesh().empty else self._apply_over_mesh
        y, sums, token_values = apply(groups, mask, ids, key)
        sums = {name: jnp.sum(values, axis=0) for name, values in sums.items()}
        return y.reshape(*x.shape[:2], -1), sums | {n: v.reshape(x.shape[:2]) for n, v in token_values.items()}

    def _apply_local(
        self,
        x: Float[Array, "G S D"],
        mask: Bool[Array, "G S"],
        ids: Int[Array, "G S"] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "G S M"], RoutingSums, RoutingSums]:
        routing = self._route(x, mask, ids, group_keys(key, 0, x.shape[0]))
        y = self._experts(x, routing, partial(apply_experts, key=self._expert_key(key)))
        return y, routing.losses | routing.metrics, routing.token_values

    def _apply_over_mesh(
        self,
        x: Float[Array, "G S D"],
        mask: Bool[Array, "G S"],
        ids: Int[Array, "G S"] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "G S M"], RoutingSums, RoutingSums]:
        mesh = jax.sharding.get_abstract_mesh()
        columns = mesh.shape[EXPERT]
        local_groups, rest = divmod(x.shape[0], mesh.shape[DATA] * columns)
        if rest:
            raise UserError(
                f"{x.shape[0]} groups of {x.shape[1]} tokens do not divide over the {mesh.shape[DATA] * columns} "
                f"shards of data x expert: moe.group_size={self.config.group_size} is too large or the batch too small"
            )
        assert self.config.dispatch != "ragged" or columns == 1, "check_fit refuses this"
        sliced = are_sliced(self.experts)

        def island(
            layer: MoELayer,
            x: Float[Array, "G S D"],
            mask: Bool[Array, "G S"],
            ids: Int[Array, "G S"] | None,
            key: PRNGKeyArray | None,
        ) -> tuple[Array, RoutingSums, RoutingSums]:
            shard = jax.lax.axis_index(DATA) * columns + jax.lax.axis_index(EXPERT)
            routing = layer._route(x, mask, ids, group_keys(key, shard * local_groups, local_groups))
            y = layer._experts(x, routing, partial(apply_experts_over_mesh, key=layer._expert_key(key)))
            # The slices of d_ff add up here, not before the way back: combine is linear, tokens are fewer than slots.
            y = jax.lax.psum(y, MODEL) if sliced else y
            return y, routing.losses | routing.metrics, routing.token_values

        groups = partition_spec("group")
        in_specs = (parameter_specs(self), groups, groups, groups, PartitionSpec())
        # Pallas kernels, as grouped products are, do not say over which axes their results vary.
        checked = self.config.dispatch != "ragged"
        shard = jax.shard_map(island, in_specs=in_specs, out_specs=(groups, groups, groups), check_vma=checked)
        return shard(self, x, mask, ids, key)

    def _route(
        self,
        x: Float[Array, "G S D"],
        mask: Bool[Array, "G S"],
        ids: Int[Array, "G S"] | None,
        keys: Key[Array, "G"] | None,
    ) -> Routing:
        config = self.config
        capacity = capacity_of(config, config.num_experts, x.shape[1], training=keys is not None)
        tokens = Tokens(x.astype(jnp.float32), mask, capacity, ids, keys)
        weights = {name: weight[...] for name, weight in self.router.items()}
        return ROUTERS[config.router].route(weights, explore(tokens, config), config)

    def _expert_key(self, key: PRNGKeyArray | None) -> PRNGKeyArray | None:
        return key if self.config.expert_dropout else None

    def _experts(
        self, x: Float[Array, "G S D"], routing: Routing, apply: Callable[[Any, Array], Array]
    ) -> Float[Array, "G S M"]:
        """Dispatch, experts, combine."""
        if self.config.dispatch == "ragged":
            return apply_ragged(self.experts, x, routing)
        form = DISPATCHERS[self.config.dispatch]
        return form.combine(apply(self.experts, form.dispatch(x, routing)), routing)


def explore(tokens: Tokens, config: MoEConfig) -> Tokens:
    """The tokens as the router sees them in training: with jitter and dropout (Switch Transformer, appendix C)."""
    if tokens.keys is None:
        return tokens
    x = tokens.x
    if config.jitter_noise:
        x = jitter(x, config.jitter_noise, tokens.keys)
    if config.input_dropout:
        keep = tokens.random(
            "input dropout", lambda key: jax.random.bernoulli(key, 1 - config.input_dropout, x.shape[1:])
        )
        x = jnp.where(keep, x / (1 - config.input_dropout), 0.0)
    return dataclasses.replace(tokens, x=x)
