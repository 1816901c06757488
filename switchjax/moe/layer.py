"""The MoE layer: route, dispatch, exchange, experts, exchange, combine, in one `shard_map` island.

Tokens lie over the axes data and expert, in groups that no device shares, so routing never communicates. Bytes cross
devices in two places: each slot's token travels to its expert and the result back (all-to-all over `expert`), and the
experts' tensor-parallel slices add up (all-reduce over `model`).
"""

import dataclasses
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
from switchjax.moe.ragged import apply_ragged
from switchjax.moe.routers import ROUTERS
from switchjax.moe.routing import RouterSizes, Routing, Tokens, jitter
from switchjax.moe.slots import expert_capacity
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import parameter_specs, partition_spec
from switchjax.parallel.stacking import stack

EXCHANGE = "exchange"
"""Name under which a remat policy finds what the all-to-alls brought."""

RoutingSums = dict[str, Float[Array, "..."]]
"""Losses and metrics of a layer, summed over tokens (see `switchjax.moe.losses.summarize`), and `Routing.token_values`
as [B, L]."""


def check_router(config: MoEConfig) -> None:
    """Raises a `UserError` unless the router exists and knows the number of selected experts."""
    check_choice("moe.router", config.router, ROUTERS)
    known = ROUTERS[config.router].selected
    if known is not None and config.num_selected_experts not in known:
        raise UserError(
            f"moe.router={config.router} selects {' or '.join(map(str, known))} expert(s), "
            f"but moe.num_selected_experts={config.num_selected_experts}"
        )


def noncausal_because(config: MoEConfig) -> str | None:
    """Why, in evaluation, what comes after a token can change its experts; None if it cannot."""
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
    `moe.dropless`. All noise is the same on every mesh, but for expert dropout where `model` > 1: each slice of d_ff
    draws its own.

    Args:
        make_expert: makes one expert from a key: a module from [N, D] to [N, D'], called as `expert(x, key)` where the
            key is for dropout and None in evaluation.
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
        routing = self._route(x, mask, ids, _group_keys(key, 0, x.shape[0]))
        if self.config.dispatch == "ragged":
            return apply_ragged(self.experts, x, routing), routing.losses | routing.metrics, routing.token_values
        slots, combine = self._dispatch(x, routing)
        expert_keys = _group_keys(_slice_key(key, 0), 0, x.shape[0])
        y = _apply_experts(self.experts, slots, jnp.arange(self.config.num_experts), expert_keys)
        return combine(y), routing.losses | routing.metrics, routing.token_values

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
        local_experts = self.config.num_experts // columns
        if self.config.dispatch == "ragged" and columns > 1:
            raise UserError(
                f"moe.dispatch=ragged keeps all experts on each device, but mesh.expert={columns}: "
                "set mesh.expert=1 (mesh.data and mesh.model may divide the devices), or moe.dispatch=gather"
            )
        if rest:
            raise UserError(
                f"{x.shape[0]} groups of {x.shape[1]} tokens do not divide over the {mesh.shape[DATA] * columns} "
                f"shards of data x expert: moe.group_size={self.config.group_size} is too large or the batch too small"
            )

        def island(
            layer: MoELayer,
            x: Float[Array, "G S D"],
            mask: Bool[Array, "G S"],
            ids: Int[Array, "G S"] | None,
            key: PRNGKeyArray | None,
        ) -> tuple[Array, RoutingSums, RoutingSums]:
            row, column = jax.lax.axis_index(DATA), jax.lax.axis_index(EXPERT)
            routing = layer._route(
                x, mask, ids, _group_keys(key, (row * columns + column) * local_groups, local_groups)
            )
            if layer.config.dispatch == "ragged":
                y = jax.lax.psum(apply_ragged(layer.experts, x, routing), MODEL)
                return y, routing.losses | routing.metrics, routing.token_values
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
            return jax.lax.psum(combine(y), MODEL), routing.losses | routing.metrics, routing.token_values

        groups = partition_spec("group")
        in_specs = (parameter_specs(self), groups, groups, groups, PartitionSpec())
        return jax.shard_map(island, in_specs=in_specs, out_specs=(groups, groups, groups))(self, x, mask, ids, key)

    def _route(
        self,
        x: Float[Array, "G S D"],
        mask: Bool[Array, "G S"],
        ids: Int[Array, "G S"] | None,
        keys: Key[Array, "G"] | None,
    ) -> Routing:
        config = self.config
        factor = config.eval_capacity_factor if keys is None else config.train_capacity_factor
        capacity = expert_capacity(
            x.shape[1], config.num_experts, config.num_selected_experts, factor, config.min_expert_capacity
        )
        tokens = Tokens(x.astype(jnp.float32), mask, x.shape[1] if config.dropless else capacity, ids, keys)
        weights = {name: weight[...] for name, weight in self.router.items()}
        return ROUTERS[config.router].route(weights, explore(tokens, config), config)

    def _dispatch(self, x: Float[Array, "G S D"], routing: Routing) -> tuple[Array, Callable[[Array], Array]]:
        form = DISPATCHERS[self.config.dispatch]
        return form.dispatch(x, routing), lambda y: form.combine(y, routing)


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
