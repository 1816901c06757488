"""The BASE layer (Lewis et al. 2021): experts in a residual layer of their own between two blocks."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from switchjax.config import MoEConfig, UserError
from switchjax.moe.layer import MoELayer
from switchjax.moe.routing import RoutingReport
from switchjax.parallel.mesh import DATA, EXPERT
from switchjax.parallel.sharding import partition_spec


class BaseLayer(nnx.Module):
    """`y = x + sigmoid(x . w_e) f_e(x)`, where f_e is an expert with a norm of its own, and 0 at first.

    In training, tokens are first shuffled over the batch, because neighbours resemble each other and should not share a
    group. Then each expert takes equally many tokens of a group (`switchjax.moe.routers.base.route_base`). The shuffle
    depends on the mesh: on another mesh, other tokens meet in a group. In evaluation nothing is shuffled.

    Args:
        make_expert: makes one f_e, as for `MoELayer` (`switchjax.models.blocks.NormedExpert`).

    Raises:
        UserError: for a router other than base, or for ragged dispatch, which cannot apply an expert's norm.
    """

    def __init__(
        self, make_expert: Callable[[PRNGKeyArray], nnx.Module], d_model: int, config: MoEConfig, key: PRNGKeyArray
    ):
        if config.router != "base" or config.dispatch == "ragged":
            raise UserError(
                "a BASE layer needs moe.router=base and moe.dispatch=gather or einsum, "
                f"got moe.router={config.router} and moe.dispatch={config.dispatch}"
            )
        self.moe = MoELayer(make_expert, d_model, config, key)

    def __call__(
        self, x: Float[Array, "B L D"], token_mask: Bool[Array, "B L"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingReport]:
        """Applies the layer to the residual stream; padding comes back unchanged.

        Raises:
            UserError: if groups, or in training the tokens of a shard, do not divide over the mesh.
        """
        if key is None:
            y, report = self.moe(x, token_mask, None)
            return x + y, report
        shuffle_key, key = jax.random.split(key)
        y, report = self.moe(shuffle(x, shuffle_key), shuffle(token_mask, shuffle_key), key)
        return x + unshuffle(y, shuffle_key), report

    def next_state(self, sums: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        """`MoELayer.next_state`, with the names of this layer."""
        return {f"moe/{name}": value for name, value in self.moe.next_state(sums).items()}


def shuffle(x: Shaped[Array, "B L *D"], key: PRNGKeyArray) -> Shaped[Array, "B L *D"]:
    """Permutes the tokens of a batch at random; arrays shuffled with the same key stay aligned.

    Over a mesh, each of the P shards of data x expert permutes its own tokens and sends an equal share to every shard
    (the shuffle of BASE, section 3.3): one all-to-all, after which any P consecutive tokens come from P shards. Not all
    permutations are then equally likely.

    Raises:
        UserError: if the tokens of a shard do not divide over the shards.
    """
    return _move(x, key, back=False)


def unshuffle(x: Shaped[Array, "B L *D"], key: PRNGKeyArray) -> Shaped[Array, "B L *D"]:
    """The inverse of `shuffle` with the same key."""
    return _move(x, key, back=True)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _move(x: Array, key: PRNGKeyArray, back: bool) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _move_local(x, key, back, exchange=lambda rows: rows)
    shards = mesh.shape[DATA] * mesh.shape[EXPERT]
    if x.shape[0] * x.shape[1] % shards**2:
        raise UserError(
            f"a BASE layer's {x.shape[0]} x {x.shape[1]} tokens do not divide over {shards} shards, each into equal "
            f"shares for all: the number of tokens must be a multiple of {shards**2}"
        )

    def exchange(rows: Array) -> Array:
        # Shard i swaps its column j for column i of shard j, so the exchange is its own inverse.
        columns = rows.reshape(-1, shards, *rows.shape[1:])
        return jax.lax.all_to_all(columns, (DATA, EXPERT), split_axis=1, concat_axis=1, tiled=True).reshape(rows.shape)

    def island(x: Array, key: PRNGKeyArray) -> Array:
        return _move_local(x, jax.random.fold_in(key, jax.lax.axis_index((DATA, EXPERT))), back, exchange)

    batch = partition_spec("batch")
    return jax.shard_map(island, in_specs=(batch, PartitionSpec()), out_specs=batch)(x, key)


def _move_local(x: Array, key: PRNGKeyArray, back: bool, exchange: Callable[[Array], Array]) -> Array:
    rows = x.reshape(-1, *x.shape[2:])
    order = jax.random.permutation(key, rows.shape[0])
    rows = exchange(rows)[jnp.argsort(order)] if back else exchange(rows[order])
    return rows.reshape(x.shape)


# The derivative of a permutation is its inverse.
_move.defvjp(
    lambda x, key, back: (_move(x, key, back), key),
    lambda back, key, gradient: (_move(gradient, key, not back), None),
)
