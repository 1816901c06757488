"""Expert parallelism: slots travel to their experts and back, inside a `shard_map` island.

Groups of slots (groups of tokens, or sequences) are divided over the mesh axes data and expert, experts over expert.
Bytes cross devices in three places: an all-to-all over `expert` on the way out, one on the way back, and an all-reduce
over `model` where experts are sliced over it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import parameter_specs

EXCHANGE = "exchange"
"""Name by which a remat policy finds the results of the all-to-alls."""


def apply_experts(experts: Any, slots: Float[Array, "E G C D"], key: PRNGKeyArray | None) -> Float[Array, "E G C M"]:
    """Applies each expert to its slots of all groups, on one device."""
    keys = group_keys(_slice_key(key, 0), 0, slots.shape[1])
    return _apply(experts, slots, jnp.arange(slots.shape[0]), keys)


def apply_experts_over_mesh(
    experts: Any, slots: Float[Array, "E G C D"], key: PRNGKeyArray | None
) -> Float[Array, "E G C M"]:
    """Sends this device's slots for all E experts to the experts' devices, applies the experts and sends results back.

    Inside a `shard_map` island; `experts` are the E / columns of this device.
    """
    columns = jax.lax.axis_size(EXPERT)
    local_experts, groups = slots.shape[0] // columns, slots.shape[1] * columns
    row, column = jax.lax.axis_index(DATA), jax.lax.axis_index(EXPERT)
    # [E, g, C, D] -> [E / columns, g * columns, C, D]: this device gets the slots that all devices of its row have
    # filled for its own experts.
    slots = checkpoint_name(jax.lax.all_to_all(slots, EXPERT, split_axis=0, concat_axis=1, tiled=True), EXCHANGE)
    keys = group_keys(_slice_key(key, jax.lax.axis_index(MODEL)), row * groups, groups)
    y = _apply(experts, slots, column * local_experts + jnp.arange(local_experts), keys)
    # The inverse: [E / columns, g * columns, C, M] -> [E, g, C, M].
    return checkpoint_name(jax.lax.all_to_all(y, EXPERT, split_axis=1, concat_axis=0, tiled=True), EXCHANGE)


def are_sliced(experts: Any) -> bool:
    """True if experts are sliced over `model`, so that their outputs are partial sums over it."""
    return any(MODEL in spec for spec in jax.tree.leaves(parameter_specs(experts)))


def group_keys(key: PRNGKeyArray | None, first: int | Int[Array, ""], count: int) -> Key[Array, "G"] | None:
    """A key for each of `count` groups from number `first` on, so that noise is the same on every mesh."""
    if key is None:
        return None
    return jax.vmap(lambda group: jax.random.fold_in(key, group))(first + jnp.arange(count))


def _slice_key(key: PRNGKeyArray | None, model_index: int | Int[Array, ""]) -> PRNGKeyArray | None:
    """The key for dropout inside the experts, a different one for each slice of d_ff."""
    # The number counts down from the largest one, so that it never equals a group's number.
    return None if key is None else jax.random.fold_in(key, 2**31 - 1 - model_index)


def _apply(
    experts: Any, slots: Float[Array, "E G C D"], expert_ids: Int[Array, "E"], keys: Key[Array, "G"] | None
) -> Float[Array, "E G C M"]:
    """Applies each expert to its slots; dropout has a key for each group and expert, the same on every mesh."""

    def one_expert(expert: Any, slots: Array, expert_id: Array) -> Array:
        if keys is None:  # all groups in one product
            return expert(slots.reshape(-1, slots.shape[-1]), None).reshape(*slots.shape[:2], -1)
        return jax.vmap(lambda rows, key: expert(rows, jax.random.fold_in(key, expert_id)))(slots, keys)

    return jax.vmap(one_expert)(experts, slots, expert_ids)
