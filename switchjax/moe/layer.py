"""The MoE layer: route, dispatch, exchange, experts, exchange, combine, in one `shard_map` island.

Tokens are divided over the axes data and expert, in groups that lie whole on one device, so routing never communicates.
Bytes cross devices in three places: each slot's token travels to its expert and the result travels back (two
all-to-alls over `expert`), and the experts' tensor-parallel slices are added up (all-reduce over `model`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import MoEConfig, UserError
from switchjax.moe.capacity import capacity_of
from switchjax.moe.choice import jitter
from switchjax.moe.dispatch import DISPATCHERS
from switchjax.moe.expert_parallel import apply_experts, apply_experts_over_mesh, are_sliced, group_keys
from switchjax.moe.ragged import apply_ragged
from switchjax.moe.routers import check_router, router_of, router_options
from switchjax.moe.routing import RouterSizes, RoutingReport, Tokens
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import parameter_specs, partition_spec
from switchjax.parallel.stacking import stack


class MoELayer(nnx.Module):
    """E experts behind a router, with a buffer of `expert_capacity` slots for each expert and group.

    A token's result depends on the other tokens of its group, because they may fill its expert's buffer. With
    `moe.dropless` it does not, except for routers that balance a group in training (base, sinkhorn). All noise is the
    same on every mesh, except expert dropout where `model` > 1: each slice of d_ff draws its own.

    Args:
        make_expert: makes one expert from a key: a module from [N, D] to [N, M], called as `expert(x, key)` with a key
            for dropout or None. For ragged dispatch, all stacked experts are called at once as `experts(x, None,
            matmul)` and apply `matmul` to every weight (`switchjax.moe.ragged`).
        vocab_size: number of token ids, for routers that use them.
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
        self.config, self.options = config, router_options(config)
        sizes = RouterSizes(d_model, config.num_experts, vocab_size)
        weights = router_of(config).weights(sizes, self.options, router_key)
        # float32 whatever the model's dtype is: selective precision (Switch Transformer, section 2.4).
        self.router = nnx.Dict(
            {name: nnx.Param(made.value, axes=made.axes, trained=made.trained) for name, made in weights.items()}
        )
        self.experts = stack(make_expert, jax.random.split(expert_key, config.num_experts), "expert")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L M"], RoutingReport]:
        """Applies to each token the experts that it is routed to; zeros for a token without a slot.

        Args:
            x: tokens; a group is some whole rows, or an even part of one (`MoEConfig.tokens_per_group`).
            token_mask: False for padding.
            key: for routing noise and expert dropout; None in evaluation, which has a capacity of its own.
            token_ids: ids in the vocabulary, for routers that use them.

        Returns:
            The experts' outputs, and the report, summed over groups.

        Raises:
            UserError: if rows do not divide into groups, or groups not over the mesh.
        """
        size = self.config.tokens_per_group(x.shape[0], x.shape[1])
        ids = None if token_ids is None else token_ids.reshape(-1, size)
        groups = (x.reshape(-1, size, x.shape[-1]), token_mask.reshape(-1, size), ids)
        if jax.sharding.get_abstract_mesh().empty:
            y, routed = self._route_and_apply(*groups, key, 0, apply_experts)
        else:
            y, routed = self._over_mesh(*groups, key)
        losses, metrics, state_sums = jax.tree.map(
            lambda values: jnp.sum(values, axis=0), (routed.losses, routed.metrics, routed.state_sums)
        )
        values = {name: value.reshape(x.shape[:2]) for name, value in routed.token_values.items()}
        return y.reshape(*x.shape[:2], -1), RoutingReport(losses, metrics, values, state_sums)

    def next_state(self, sums: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        """The weights that the router moves itself, by name, after a step with these `RoutingReport.state_sums`."""
        move = router_of(self.config).next_state
        moved = {} if move is None else move(self._router_weights(), sums, self.options)
        return {f"router/{name}": value for name, value in moved.items()}

    def _router_weights(self) -> dict[str, Array]:
        return {name: weight[...] for name, weight in self.router.items()}

    def _over_mesh(
        self,
        x: Float[Array, "G S D"],
        mask: Bool[Array, "G S"],
        ids: Int[Array, "G S"] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "G S M"], RoutingReport]:
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
            layer: MoELayer, x: Array, mask: Array, ids: Array | None, key: PRNGKeyArray | None
        ) -> tuple[Float[Array, "G S M"], RoutingReport]:
            shard = jax.lax.axis_index(DATA) * columns + jax.lax.axis_index(EXPERT)
            y, report = layer._route_and_apply(x, mask, ids, key, shard * local_groups, apply_experts_over_mesh)
            # Slices of d_ff are added up here, after combine, and not before the second all-to-all: combine is linear,
            # and there are fewer tokens than slots.
            return jax.lax.psum(y, MODEL) if sliced else y, report

        groups = partition_spec("group")
        in_specs = (parameter_specs(self), groups, groups, groups, PartitionSpec())
        # shard_map cannot check Pallas kernels (the grouped products): they do not declare how their results vary.
        checked = self.config.dispatch != "ragged"
        shard = jax.shard_map(island, in_specs=in_specs, out_specs=(groups, groups), check_vma=checked)
        return shard(self, x, mask, ids, key)

    def _route_and_apply(
        self,
        x: Float[Array, "G S D"],
        mask: Bool[Array, "G S"],
        ids: Int[Array, "G S"] | None,
        key: PRNGKeyArray | None,
        first_group: int | Int[Array, ""],
        apply: Callable[[Any, Array, PRNGKeyArray | None], Array],
    ) -> tuple[Float[Array, "G S M"], RoutingReport]:
        """Routes, dispatches, applies the experts and combines: the groups of one device, from `first_group` on."""
        config, keys = self.config, group_keys(key, first_group, x.shape[0])
        capacity = capacity_of(config, config.num_experts, x.shape[1], training=keys is not None)
        tokens = explore(Tokens(x.astype(jnp.float32), mask, capacity, ids, keys), config)
        router = router_of(config)
        routing = router.route(self._router_weights(), tokens, config, self.options)
        if undeclared := routing.losses.keys() - router.losses.keys():
            raise UserError(
                f"router {config.router} returns {', '.join(sorted(undeclared))} without a default weight: "
                "name it in Router.losses"
            )
        if config.dispatch == "ragged":
            y = apply_ragged(self.experts, x, routing)
        else:
            form = DISPATCHERS[config.dispatch]
            slots = form.dispatch(x, routing)  # [G, S, D] -> [E, G, C, D]
            # On a mesh, `apply` contains both all-to-alls: slots to their experts, and results back.
            y = apply(self.experts, slots, key if config.expert_dropout else None)  # -> [E, G, C, M]
            y = form.combine(y, routing)  # -> [G, S, M]
        return y, RoutingReport(routing.losses, routing.metrics, routing.token_values, routing.state_sums)


def explore(tokens: Tokens, config: MoEConfig) -> Tokens:
    """The tokens as the router sees them in training: with jitter and dropout (Switch Transformer, appendix C)."""
    if tokens.keys is None:
        return tokens
    x, kept = tokens.x, 1 - config.input_dropout
    if config.jitter_noise:
        x = jitter(x, config.jitter_noise, tokens.keys)
    if config.input_dropout:
        keep = tokens.random("input dropout", lambda key: jax.random.bernoulli(key, kept, x.shape[1:]))
        x = jnp.where(keep, x / kept, 0.0)
    return dataclasses.replace(tokens, x=x)
