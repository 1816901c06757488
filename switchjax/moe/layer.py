"""The MoE layer: route, dispatch, exchange, experts, exchange, combine, in one `shard_map` island.

Tokens lie over the axes data and expert, in groups that no device shares, so routing never communicates. Bytes cross
devices in two places: each slot's token travels to its expert and the result back (all-to-all over `expert`), and the
experts' tensor-parallel slices add up (all-reduce over `model`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from switchjax.config import MoEConfig, UserError, check_choice
from switchjax.moe.dispatch import DISPATCHERS
from switchjax.moe.routing import ROUTERS, Routing, jitter
from switchjax.moe.slots import expert_capacity
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import parameter_specs, partition_spec
from switchjax.parallel.stacking import stack

EXCHANGE = "exchange"
"""Name under which a remat policy finds what the all-to-alls brought."""

RoutingSums = dict[str, Float[Array, "..."]]
"""Losses and metrics of a layer, summed over tokens; see `switchjax.moe.losses.summarize`."""


class MoELayer(nnx.Module):
    """E experts behind a router and buffers of `expert_capacity` slots an expert and group.

    The outcome for a token depends on the tokens before it in its group, as those may fill its expert's buffer. All
    noise is the same on every mesh, but for expert dropout where `model` > 1: each slice of d_ff draws its own.

    Args:
        make_expert: makes one expert from a key: a module from [N, D] to [N, D], called as `expert(x, key)` where the
            key is for dropout and None in evaluation.
        d_model: D.
        config: routing, capacity and losses.
        key: for initialisation.
    """

    def __init__(
        self, make_expert: Callable[[PRNGKeyArray], nnx.Module], d_model: int, config: MoEConfig, key: PRNGKeyArray
    ):
        check_choice("moe.router", config.router, ROUTERS)
        router_key, expert_key = jax.random.split(key)
        self.config = config
        # float32 whatever the model's dtype: selective precision (Switch Transformer, section 2.4). N(0, 0.02) as
        # released; scaled by fan_in like other weights, a narrow model's router drops more tokens at first.
        init = jax.nn.initializers.truncated_normal(0.02)
        self.router = nnx.Param(init(router_key, (d_model, config.num_experts), jnp.float32), axes=("embed", None))
        self.experts = stack(make_expert, jax.random.split(expert_key, config.num_experts), "expert")

    def __call__(
        self, x: Float[Array, "B L D"], token_mask: Bool[Array, "B L"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingSums]:
        """Applies to each token the experts that it is routed to; zeros where it found no slot.

        Args:
            x: tokens; a group is some whole rows, or an even part of one (`MoEConfig.tokens_per_group`).
            token_mask: False for padding.
            key: for jitter and expert dropout; None in evaluation, which also takes the evaluation's capacity.

        Raises:
            UserError: if rows do not divide into groups, or groups not over the mesh.
        """
        size = self.config.tokens_per_group(x.shape[0], x.shape[1])
        groups = x.reshape(-1, size, x.shape[-1])
        mask = token_mask.reshape(-1, size)
        apply = self._apply_local if jax.sharding.get_abstract_mesh().empty else self._apply_over_mesh
        y, sums = apply(groups, mask, key)
        return y.reshape(x.shape), jax.tree.map(lambda values: jnp.sum(values, axis=0), sums)

    def _apply_local(
        self, x: Float[Array, "G S D"], mask: Bool[Array, "G S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "G S D"], RoutingSums]:
        routing = self._route(x, mask, _group_keys(key, 0, x.shape[0]))
        slots, combine = self._dispatch(x, routing)
        expert_keys = _group_keys(_slice_key(key, 0), 0, x.shape[0])
        y = _apply_experts(self.experts, slots, jnp.arange(self.config.num_experts), expert_keys)
        return combine(y), routing.losses | routing.metrics

    def _apply_over_mesh(
        self, x: Float[Array, "G S D"], mask: Bool[Array, "G S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "G S D"], RoutingSums]:
        mesh = jax.sharding.get_abstract_mesh()
        columns = mesh.shape[EXPERT]
        local_groups, rest = divmod(x.shape[0], mesh.shape[DATA] * columns)
        local_experts = self.config.num_experts // columns
        if rest:
            raise UserError(
                f"{x.shape[0]} groups of {x.shape[1]} tokens do not divide over the {mesh.shape[DATA] * columns} "
                f"shards of data x expert: moe.group_size={self.config.group_size} is too large or the batch too small"
            )

        def island(
            layer: MoELayer, x: Float[Array, "G S D"], mask: Bool[Array, "G S"], key: PRNGKeyArray | None
        ) -> tuple[Array, RoutingSums]:
            row, column = jax.lax.axis_index(DATA), jax.lax.axis_index(EXPERT)
            routing = layer._route(x, mask, _group_keys(key, (row * columns + column) * local_groups, local_groups))
            slots, combine = layer._dispatch(x, routing)  # [E, g, C, D], the device's own tokens
            # Out: experts are split over the axis, groups are gathered in the order of the axis.
            slots = jax.lax.all_to_all(slots, EXPERT, split_axis=0, concat_axis=1, tiled=True)
            slots = checkpoint_name(slots, EXCHANGE)
            slice_key = _slice_key(key, jax.lax.axis_index(MODEL))
            expert_keys = _group_keys(slice_key, row * columns * local_groups, columns * local_groups)
            y = _apply_experts(layer.experts, slots, column * local_experts + jnp.arange(local_experts), expert_keys)
            y = jax.lax.all_to_all(y, EXPERT, split_axis=1, concat_axis=0, tiled=True)
            y = checkpoint_name(y, EXCHANGE)
            # The slices of d_ff add up here, not before the way back: combine is linear, tokens are fewer than slots.
            return jax.lax.psum(combine(y), MODEL), routing.losses | routing.metrics

        groups = partition_spec("group")
        return jax.shard_map(
            island, in_specs=(parameter_specs(self), groups, groups, PartitionSpec()), out_specs=(groups, groups)
        )(self, x, mask, key)

    def _route(self, x: Float[Array, "G S D"], mask: Bool[Array, "G S"], keys: Key[Array, "G"] | None) -> Routing:
        config = self.config
        inputs = x.astype(jnp.float32)
        if keys is not None and config.jitter_noise:
            inputs = jitter(inputs, config.jitter_noise, keys)
        logits = jnp.einsum("gsd,de->gse", inputs, self.router[...], precision=jax.lax.Precision.HIGHEST)
        factor = config.eval_capacity_factor if keys is None else config.train_capacity_factor
        capacity = expert_capacity(
            x.shape[1], config.num_experts, config.num_selected_experts, factor, config.min_expert_capacity
        )
        return ROUTERS[config.router](logits, mask, capacity)

    def _dispatch(self, x: Float[Array, "G S D"], routing: Routing) -> tuple[Array, Callable[[Array], Array]]:
        form = DISPATCHERS[self.config.dispatch]
        return form.dispatch(x, routing), lambda y: form.combine(y, routing)


def _slice_key(key: PRNGKeyArray | None, model_index: int | Int[Array, ""]) -> PRNGKeyArray | None:
    """The key for dropout inside the experts, one a slice of d_ff; counted down, away from the groups' numbers."""
    return None if key is None else jax.random.fold_in(key, 2**31 - 1 - model_index)


def _group_keys(key: PRNGKeyArray | None, first: int | Int[Array, ""], count: int) -> Key[Array, "G"] | None:
    """A key for each of `count` groups from the group numbered `first` on: the same noise on every mesh."""
    if key is None:
        return None
    return jax.vmap(lambda group: jax.random.fold_in(key, group))(first + jnp.arange(count))


def _apply_experts(
    experts: Any, slots: Float[Array, "E G C D"], expert_ids: Int[Array, "E"], keys: Key[Array, "G"] | None
) -> Float[Array, "E G C D"]:
    """Each expert on its slots of all groups; dropout is keyed by (group, expert), the same on every mesh."""

    def one_expert(expert: Any, slots: Array, expert_id: Array) -> Array:
        if keys is None:
            return jax.vmap(lambda rows: expert(rows, None))(slots)
        return jax.vmap(lambda rows, key: expert(rows, jax.random.fold_in(key, expert_id)))(slots, keys)

    return jax.vmap(one_expert)(experts, slots, expert_ids)
