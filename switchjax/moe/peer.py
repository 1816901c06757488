"""PEER: experts of a single neuron, a million of them, found by product keys (He 2024, "Mixture of a million experts").

There are no slots: each token gathers the rows of its experts. Over a mesh, the two tables of rows are divided over the
axis `expert`, and all tokens of that axis visit every part of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from switchjax.config import MoEConfig, UserError, check_positive, from_mapping
from switchjax.moe.routing import RoutingReport
from switchjax.parallel.mesh import DATA, EXPERT
from switchjax.parallel.sharding import partition_spec

CHUNK_ELEMENTS = 2**21
"""Largest number of values that are gathered from each table at a time: 8 MB in float32."""
AVERAGE_STEP = 0.1
"""Weight of each step's statistics in the running averages."""


@dataclass(frozen=True)
class PEEROptions:
    """Options of PEER, in `moe.options`."""

    peer_heads: int = 8
    """H, number of heads; each selects `num_selected_experts` of the `num_experts` single neurons."""
    peer_query: int = 256
    """Length of a head's query; each set of sub-keys sees one half."""

    def __post_init__(self) -> None:
        check_positive("moe.options", dataclasses.asdict(self))


class PEERLayer(nnx.Module):
    """N = n^2 neurons, of which each of H heads finds its k best for a token: `y = sum_h sum_k g gelu(u_e . x) v_e`.

    N is `moe.num_experts`, and k is `moe.num_selected_experts` (16 in the paper). Retrieval and gates are float32
    whatever the model's dtype is; `dtype` is that of the two tables. Because of batch norm, a token's experts depend on
    the whole batch in training; in evaluation they depend on the token alone.

    Raises:
        UserError: if N is not a square, k exceeds n, or the length of a query is odd.
    """

    def __init__(self, d_model: int, config: MoEConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32):
        options = from_mapping(PEEROptions, config.options, "moe.options")
        num_experts, num_selected, d_query = config.num_experts, config.num_selected_experts, options.peer_query
        side = math.isqrt(num_experts)
        if side**2 != num_experts:
            raise UserError(
                f"PEER needs a square number of experts, got {num_experts}: "
                f"the nearest are {side**2} and {(side + 1) ** 2}"
            )
        if num_selected > side:
            raise UserError(
                f"a PEER head of {num_experts} experts selects at most {side} (their square root), got {num_selected}"
            )
        if d_query % 2:
            raise UserError(f"a PEER query has two halves, but moe.options.peer_query={d_query} is odd")
        self.num_selected = num_selected
        query_key, sub_key, down_key, up_key = jax.random.split(key, 4)
        heads, half = options.peer_heads, d_query // 2

        def weight(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike = jnp.float32) -> Array:
            # Variance 0.1 / fan_in as everywhere: cut off at 2 deviations, a normal keeps 0.88 of its deviation.
            return jax.nn.initializers.truncated_normal(math.sqrt(0.1 / fan_in) / 0.8796)(key, shape, dtype)

        by_query = (None, None, None)
        self.query = nnx.Param(weight(query_key, (d_model, heads, 2, half), d_model), axes=("embed", *by_query))
        self.norm_scale = nnx.Param(jnp.ones((heads, 2, half)), axes=by_query)
        self.norm_bias = nnx.Param(jnp.zeros((heads, 2, half)), axes=by_query)
        # Running averages: `next_state` moves them.
        self.norm_mean = nnx.Param(jnp.zeros((heads, 2, half)), axes=by_query, trained=False)
        self.norm_variance = nnx.Param(jnp.ones((heads, 2, half)), axes=by_query, trained=False)
        self.sub_keys = nnx.Param(weight(sub_key, (2, side, half), half), axes=(None, None, None))
        self.down = nnx.Param(weight(down_key, (num_experts, d_model), d_model, dtype), axes=("expert", "embed"))
        # The gates of a head sum to 1, so an output has H inputs.
        self.up = nnx.Param(weight(up_key, (num_experts, d_model), heads, dtype), axes=("expert", "embed"))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RoutingReport]:
        """Applies to each token the experts that its heads select; zeros for padding. `token_ids` has no effect.

        Without a key, as in evaluation, running averages normalise the queries; nothing here is random. In training,
        the report has the batch's statistics, without padding, by which `next_state` moves the averages.
        """
        # For a token of zeros, gelu(u . x) v is zero.
        x = jnp.where(token_mask[..., None], x, jnp.zeros((), x.dtype))
        query, sums = self._query(x.astype(jnp.float32), token_mask, key is not None)
        scores = jnp.einsum("blhsq,snq->blhsn", query, self.sub_keys[...], precision=jax.lax.Precision.HIGHEST)
        apply = _apply_local if jax.sharding.get_abstract_mesh().empty else _apply_over_mesh
        y = apply(x, scores, self.down[...], self.up[...], self.num_selected)
        return y, RoutingReport(state_sums=sums)

    def next_state(self, sums: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        """The running averages after a step: moved by `AVERAGE_STEP` towards the mean over its micro-batches."""
        batches = jnp.maximum(sums["batches"], 1)
        averages = {"norm_mean": self.norm_mean[...], "norm_variance": self.norm_variance[...]}
        moved = {name: value - AVERAGE_STEP * (value - sums[name] / batches) for name, value in averages.items()}
        # A step with nothing but padding leaves the averages unchanged.
        return {name: jnp.where(sums["batches"] > 0, moved[name], value) for name, value in averages.items()}

    def _query(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], training: bool
    ) -> tuple[Float[Array, "B L H 2 Q"], dict[str, Float[Array, "..."]]]:
        """The queries, normalised over the batch of all devices (all-reduces of [H, 2, Q]), and its statistics."""
        query = jnp.einsum("bld,dhsq->blhsq", x, self.query[...], precision=jax.lax.Precision.HIGHEST)
        mean, variance = jax.lax.stop_gradient((self.norm_mean[...], self.norm_variance[...]))
        sums = {}
        if training:
            some = jnp.any(mask)
            real = (mask | ~some)[..., None, None, None]  # a batch of padding has no mean
            mean, variance = jnp.mean(query, axis=(0, 1), where=real), jnp.var(query, axis=(0, 1), where=real)
            statistics = {"norm_mean": mean, "norm_variance": variance, "batches": jnp.ones(())}
            sums = {name: jax.lax.stop_gradient(jnp.where(some, value, 0.0)) for name, value in statistics.items()}
        scale = self.norm_scale[...] * jax.lax.rsqrt(variance + 1e-5)
        return (query - mean[None, None]) * scale[None, None] + self.norm_bias[...][None, None], sums


def product_key_top_k(
    scores: Float[Array, "*B 2 n"], num_selected: int
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """The k best of the n^2 sums `scores[0, i] + scores[1, j]`, best first, as values and indices `i n + j`.

    Both parts of a best sum are among the k best of their sets, so k^2 sums are enough (Lample et al. 2019).
    """
    best, place = jax.lax.top_k(scores, num_selected)
    sums = best[..., 0, :, None] + best[..., 1, None, :]
    index = place[..., 0, :, None] * scores.shape[-1] + place[..., 1, None, :]
    values, pair = jax.lax.top_k(sums.reshape(*sums.shape[:-2], -1), num_selected)
    return values, jnp.take_along_axis(index.reshape(*sums.shape[:-2], -1), pair, axis=-1)


def choose(scores: Float[Array, "B L H 2 n"], num_selected: int) -> tuple[Int[Array, "T M"], Float[Array, "T M"]]:
    """The M = H k experts of each of the T = B L tokens, and their gates, which sum to 1 for each head."""
    values, index = product_key_top_k(scores, num_selected)
    tokens = scores.shape[0] * scores.shape[1]
    return index.reshape(tokens, -1), jax.nn.softmax(values, axis=-1).reshape(tokens, -1)


def _apply_local(x: Array, scores: Array, down: Array, up: Array, num_selected: int) -> Array:
    index, gate = choose(scores, num_selected)
    return apply_neurons(x.reshape(-1, x.shape[-1]), index, gate.astype(x.dtype), down, up).reshape(x.shape)


def _apply_over_mesh(x: Array, scores: Array, down: Array, up: Array, num_selected: int) -> Array:
    """Each device applies its part of the experts to all tokens of its row of the `expert` axis.

    With T tokens a device, M experts a token, c devices in a row and numbers of b bytes, a device receives
        forward: (c - 1) T (D b + M (4 + b)) bytes by all-gathers, (c - 1) T D b by reduce-scatter;
        backward: (c - 1) T D b by all-gather, (c - 1) T (D + M) b by reduce-scatters, and its part of the tables'
            gradients, 2 N D / c numbers, is summed over `data`.
    Rows of the tables and scores stay on their device. The choice is made inside the island, because XLA's partitioner
    would gather the scores of the whole batch for it. Each device looks up c T M experts; those of others are zeros.
    """

    def island(x: Array, scores: Array, down: Array, up: Array) -> Array:
        index, gate = choose(scores, num_selected)
        tokens = x.reshape(-1, x.shape[-1]), index, gate.astype(x.dtype)
        row, index, gate = (jax.lax.all_gather(array, EXPERT, axis=0, tiled=True) for array in tokens)
        # The experts of other devices get indices beyond the end of this device's table, which `_rows` reads as zeros
        # (a negative index would count from the end).
        index -= jax.lax.axis_index(EXPERT) * down.shape[0]
        index = jnp.where(index < 0, down.shape[0], index)
        # Marked as varying, so that the tables' gradients are summed over `data` once, at the end of the island.
        down, up = jax.lax.pcast((down, up), DATA, to="varying")
        y = apply_neurons(row, index, gate, down, up)
        return jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True).reshape(x.shape)

    batch, table = partition_spec("batch"), partition_spec("expert", "embed")
    return jax.shard_map(island, in_specs=(batch, batch, table, table), out_specs=batch)(x, scores, down, up)


@jax.custom_vjp
def apply_neurons(
    x: Float[Array, "T D"],
    index: Int[Array, "T M"],
    gate: Float[Array, "T M"],
    down: Float[Array, "N D"],
    up: Float[Array, "N D"],
) -> Float[Array, "T D"]:
    """`y_t = sum_m gate_tm gelu(down[index_tm] . x_t) up[index_tm]`; an index of N or more means no expert."""
    # The rows [T, M, D] do not fit memory, so they are gathered for a chunk of tokens at a time, and again in the
    # backward pass. JAX's own derivative would make a whole table of gradients for each chunk and add these up;
    # `_backward` adds the rows of each chunk to one table.

    def chunk(inputs: tuple[Array, ...]) -> Array:
        x, index, gate = inputs
        return _weigh(x, gate, _rows(down, index), _rows(up, index))

    y = jax.lax.map(chunk, _chunks(x, index, gate))
    return y.reshape(-1, y.shape[-1])[: x.shape[0]]


def _weigh(x: Array, gate: Array, down: Float[Array, "t M D"], up: Float[Array, "t M D"]) -> Float[Array, "t D"]:
    hidden = jax.nn.gelu(jnp.einsum("td,tmd->tm", x, down.astype(x.dtype)))
    return jnp.einsum("tm,tmd->td", gate * hidden, up.astype(x.dtype))


def _rows(table: Array, index: Array) -> Float[Array, "t M D"]:
    return jnp.take(table, index, axis=0, mode="fill", fill_value=0)


def _chunks(x: Float[Array, "T D"], index: Int[Array, "T M"], *others: Array) -> tuple[Array, ...]:
    """Each array as [chunks, t, ...], the last chunk filled up with zeros, whose gates of 0 add nothing to expert 0."""
    size = min(x.shape[0], max(1, CHUNK_ELEMENTS // (index.shape[1] * x.shape[1])))
    missing = -x.shape[0] % size
    arrays = (x, index, *others)
    return tuple(jnp.pad(a, ((0, missing), (0, 0))).reshape(-1, size, a.shape[1]) for a in arrays)


def _backward(residuals: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    x, index, gate, down, up = residuals

    def chunk(tables: tuple[Array, ...], inputs: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        x, index, gate, dy = inputs
        _, transpose = jax.vjp(_weigh, x, gate, _rows(down, index), _rows(up, index))
        dx, dgate, d_down, d_up = transpose(dy)
        down_sum, up_sum = tables
        return (down_sum.at[index].add(d_down, mode="drop"), up_sum.at[index].add(d_up, mode="drop")), (dx, dgate)

    zeros: tuple[Array, ...] = jnp.zeros_like(down), jnp.zeros_like(up)
    tables, tokens = jax.lax.scan(chunk, zeros, _chunks(x, index, gate, dy))
    dx, dgate = (chunks.reshape(-1, chunks.shape[-1])[: x.shape[0]] for chunks in tokens)
    return dx, None, dgate, *tables


apply_neurons.defvjp(lambda *inputs: (apply_neurons(*inputs), inputs), _backward)
