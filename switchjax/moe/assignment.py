"""Balanced assignment of tokens to experts: by an auction (BASE) and softly, by Sinkhorn's scaling (S-BASE).

No library does this in the compiled step: scipy's `linear_sum_assignment` runs on the host, and the Hungarian algorithm
of `optax.assignment` processes tokens one after the other.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchjax.config import UserError

STEPS = 50
"""eps is the range of a group's scores divided by this number (as in fairseq's BASE)."""
MIN_EPS = 1e-4
"""The smallest eps (as in fairseq's BASE)."""
START_ITERATIONS = 16
"""Iterations of Sinkhorn's scaling for the prices at which bidding starts."""
START_TEMPERATURE = 2
"""Temperature of that scaling, in units of eps."""
SMALLEST = -40.0
"""Logarithm of the smallest entry of Sinkhorn's kernel; the largest in each row and column is 1."""


def balanced_assignment(
    scores: Float[Array, "G S E"], token_mask: Bool[Array, "G S"], capacity: int, max_rounds: int
) -> Int[Array, "G S"]:
    """The expert of each token (E for padding), at most C tokens each, with the largest sum of scores; no gradient.

    This is the auction for similar objects of Bertsekas and Castanon (1989), as in BASE (Lewis et al. 2021, section
    3.2). At prices p, each token without an expert bids for the expert with the highest value `score_e - p_e`. It
    offers the price at which that expert is worth as much as the second best, plus eps. An expert keeps its C highest
    bids; once it is full, its price is the lowest of them. So at these prices, no token gains more than eps by moving.
    All slots are sold at the end, hence the sum is within S * eps of the optimum, whatever the prices at the start.

    Padding bids too, with the same score for every expert, so that all slots are sold: slots left empty would have to
    be the cheapest. Sinkhorn's scaling gives prices to start with, which are near the last ones if tokens want the same
    experts. Tokens still without an expert after `max_rounds` take the slots that are left, in order.

    Raises:
        UserError: if S * E exceeds about 10 million, so that the integers below would not fit 32 bits.
    """
    tokens, experts = scores.shape[1:]
    slots = experts * capacity
    assert slots >= tokens, f"{experts} experts of {capacity} slots do not hold {tokens} tokens"
    # Scores, prices and bids are integers, in fractions of eps. So one sort of the integers (expert, bid, token) finds
    # the highest bids; on a CPU, sorting pairs takes ten times as long. `levels` exceeds every bid: bids stay below
    # twice the range of scores plus a step, because some expert has room at its first price until all slots are sold.
    levels = min((2**31 - 1) // (experts * slots), 2**20)
    # Each token loses a unit by rounding and each bidder a step: S * eps in total.
    padded = slots / tokens
    step = int((levels - 2 * STEPS - 2) / (2 * STEPS * padded + 1))
    if step < 1:
        raise UserError(
            f"balanced assignment of {tokens} tokens to {experts} experts exceeds 32-bit integers: "
            "a smaller moe.group_size would fit"
        )
    units = step * padded + 1  # in one eps
    highest = math.ceil(STEPS * units)

    score = _in_units(jax.lax.stop_gradient(scores), token_mask, units)
    score = jnp.pad(score, ((0, 0), (0, slots - tokens), (0, 0)))
    price = _starting_prices(score, START_TEMPERATURE * units, highest)
    score = score.swapaxes(1, 2)  # experts before tokens: the maxima over experts run over whole rows

    def unfinished(now: _Bidding) -> Array:
        return (now.rounds < max_rounds) & ~jnp.all(now.held)

    def one_round(now: _Bidding) -> _Bidding:
        wanted, offer = _offers(score, now.price, step, highest)
        expert, bid = jnp.where(now.held, now.expert, wanted), jnp.where(now.held, now.bid, offer)
        held, price = _keep_highest(expert, bid, now.price, capacity, levels)
        return _Bidding(now.rounds + 1, expert, bid, held, price)

    nobody = jnp.zeros_like(score[:, 0])
    end = jax.lax.while_loop(unfinished, one_round, _Bidding(jnp.array(0), nobody, nobody, nobody > 0, price))
    held = end.held[:, :tokens] & token_mask
    return _fill(end.expert[:, :tokens], held, token_mask, experts, capacity)


class _Bidding(NamedTuple):
    rounds: Int[Array, ""]
    expert: Int[Array, "G N"]
    bid: Int[Array, "G N"]
    held: Bool[Array, "G N"]
    """True if the expert keeps the token; if False, `expert` and `bid` are from an earlier round."""
    price: Int[Array, "G E"]


def _in_units(scores: Float[Array, "G S E"], mask: Bool[Array, "G S"], units: float) -> Int[Array, "G S E"]:
    """Scores minus the lowest of their group, in multiples of `eps / units`; 0 for padding."""
    real = mask[..., None]
    low = jnp.min(scores, axis=(1, 2), keepdims=True, where=real, initial=jnp.inf)
    high = jnp.max(scores, axis=(1, 2), keepdims=True, where=real, initial=-jnp.inf)
    eps = jnp.maximum((high - low) / STEPS, MIN_EPS)
    amount = jnp.round((scores - low) / eps * units)
    # This brings scores that are not finite into the range too.
    return jnp.where(real & (amount > 0), jnp.minimum(amount, STEPS * units), 0).astype(jnp.int32)


def _starting_prices(score: Int[Array, "G N E"], temperature: float, highest: int) -> Int[Array, "G E"]:
    """The prices at which the sum over tokens of softmax((score - price) / temperature) is equal for all experts."""
    kernel = jnp.exp(score.astype(jnp.float32) / temperature)
    scale = _balance_columns(kernel, jnp.ones_like(kernel[..., 0]), START_ITERATIONS)
    return jnp.clip(jnp.round(-temperature * jnp.log(scale)), 0, highest).astype(jnp.int32)


def _offers(
    score: Int[Array, "G E N"], price: Int[Array, "G E"], step: int, highest: int
) -> tuple[Int[Array, "G N"], Int[Array, "G N"]]:
    """The expert that each token would bid for, and its bid."""
    experts, token = score.shape[1], jnp.arange(score.shape[2])[None]
    turn = (token - jnp.arange(experts)[:, None]) % experts
    # Among equal experts, `turn` prefers another one for each token, so that equal tokens spread out. It also makes all
    # values of a token different, so the highest value modulo E identifies its expert.
    value = (score - price[..., None]) * experts + turn[None]
    best = jnp.max(value, axis=1)
    others = jnp.where(value == best[:, None], -(2**31), value)
    # A single expert has no second best; any increase will do.
    second = jnp.maximum(jnp.max(others, axis=1), best - highest * experts)
    expert = (token - best) % experts
    return expert, jnp.take_along_axis(price, expert, axis=1) + best // experts - second // experts + step


def _keep_highest(
    expert: Int[Array, "G N"], bid: Int[Array, "G N"], price: Int[Array, "G E"], capacity: int, levels: int
) -> tuple[Bool[Array, "G N"], Int[Array, "G E"]]:
    """True for the C tokens that each expert keeps, the earlier ones of equal bids; and the experts' new prices."""
    bidders, experts = expert.shape[1], price.shape[1]
    key = (expert * levels + levels - 1 - bid) * bidders + jnp.arange(bidders)[None]
    line = jnp.sort(key, axis=1, stable=False)
    bounds = jax.vmap(lambda line: jnp.searchsorted(line, jnp.arange(experts + 1) * (levels * bidders)))(line)
    first, end = bounds[:, :-1], bounds[:, 1:]
    full = first + capacity <= end
    lowest = jnp.take_along_axis(line, jnp.minimum(first + capacity, bidders) - 1, axis=1)
    kept = key <= jnp.take_along_axis(jnp.where(full, lowest, 2**31 - 1), expert, axis=1)
    return kept, jnp.where(full, levels - 1 - lowest // bidders % levels, price)


def _fill(
    expert: Int[Array, "G S"], held: Bool[Array, "G S"], mask: Bool[Array, "G S"], experts: int, capacity: int
) -> Int[Array, "G S"]:
    """The expert of each token, where real tokens without one take the free slots, in order; E for padding."""
    taken = jnp.sum(jax.nn.one_hot(jnp.where(held, expert, experts), experts, dtype=jnp.int32), axis=1)
    free = jnp.cumsum(capacity - taken, axis=1)  # free slots of all experts up to each
    nth = jnp.cumsum(mask & ~held, axis=1)
    left = jax.vmap(jnp.searchsorted)(free, nth)  # the expert of the n-th free slot
    return jnp.where(mask, jnp.where(held, expert, left), experts)


def sinkhorn(scores: Float[Array, "G S E"], token_mask: Bool[Array, "G S"], iterations: int) -> Float[Array, "G S E"]:
    """The transport plan with the highest score plus entropy: `exp(scores)` with scaled rows and columns.

    Rows sum to 1, those of padding to 0. The sums of columns become more equal with each iteration (Sinkhorn and Knopp
    1967; S-BASE, Clark et al. 2022, section 3.1).
    """
    real = token_mask[..., None]
    # The largest entry of each row and of each column becomes 1, so no sum underflows. The floor bounds the scales
    # where the largest entries alone allow no balance.
    kernel = scores - jnp.max(scores, axis=2, keepdims=True)
    kernel = kernel - jnp.max(kernel, axis=1, keepdims=True, where=real, initial=-jnp.inf)
    kernel = jnp.where(real, jnp.exp(jnp.maximum(kernel, SMALLEST)), 0)
    scaled = kernel * _balance_columns(kernel, token_mask.astype(kernel.dtype), iterations)[:, None]
    return scaled / jnp.sum(jnp.where(real, scaled, 1), axis=2, keepdims=True)


def _balance_columns(kernel: Float[Array, "G S E"], rows: Float[Array, "G S"], iterations: int) -> Float[Array, "G E"]:
    """Scales of the columns, at most 1, that make column sums equal once rows are scaled to the sums `rows`."""

    def iterate(_: Int[Array, ""], scale: Array) -> Array:
        sums = jnp.einsum("gse,ge->gs", kernel, scale, precision=jax.lax.Precision.HIGHEST)
        per_row = jnp.where(rows > 0, rows / sums, 0)
        columns = jnp.einsum("gse,gs->ge", kernel, per_row, precision=jax.lax.Precision.HIGHEST)
        scale = jnp.where(columns > 0, 1 / columns, 1)  # a group of padding has no sums
        return scale / jnp.max(scale, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, iterations, iterate, jnp.ones_like(kernel[:, 0]))
