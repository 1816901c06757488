"""Balanced assignment of tokens to experts: by an auction (BASE) and softly, by Sinkhorn's scaling (S-BASE).

By hand because both run in the compiled step: scipy's `linear_sum_assignment` runs on the host, and the Hungarian
algorithm of `optax.assignment` takes the tokens one after the other.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchjax.config import UserError

STEPS = 50
"""eps is the range of a group's scores over this many."""
MIN_EPS = 1e-4
"""The least eps (both as fairseq has them for BASE)."""
START_ITERATIONS = 16
"""Iterations of Sinkhorn's scaling, which gives the prices at which bidding starts."""
START_TEMPERATURE = 2
"""Temperature of that scaling, in eps."""
SMALLEST = -40.0
"""Logarithm of the smallest entry of Sinkhorn's kernel, beside the 1 in each row and column."""


def balanced_assignment(
    scores: Float[Array, "G S E"], token_mask: Bool[Array, "G S"], capacity: int, max_rounds: int
) -> Int[Array, "G S"]:
    """Gives each token an expert, at most C tokens each, such that the scores' sum is as large as can be; no gradient.

    The auction for similar objects of Bertsekas and Castanon (1989), as in BASE (Lewis et al. 2021, section 3.2). At
    prices p, each token without an expert bids for the one that it values most, `score_e - p_e`: what makes it as dear
    as the second best, and eps more. An expert keeps its C highest bids; once it is full, its price is the lowest of
    them. So no token with an expert would do better elsewhere by more than eps at these prices, and as all slots are
    sold at the end, the sum is within S * eps of the optimum, whatever the prices at which bidding started.

    All are sold because padding bids too, with the same score for every expert: slots left empty would have to be the
    cheapest. Prices start where Sinkhorn's scaling puts them: near the last ones, where tokens agree on what is good.

    Scores, prices and bids are whole numbers of a fraction of eps, so that one sort of integers (expert, bid, token)
    finds the highest bids; on a CPU, sorting pairs takes ten times as long.

    Args:
        scores: of the experts for each token; those of padding are not looked at.
        token_mask: False for padding.
        capacity: C; E * C >= S.
        max_rounds: of bidding; tokens without an expert then take the slots that are left, in order.

    Returns:
        The expert of each token; E for padding.

    Raises:
        UserError: if S * E is above 10 million or so: the integers would not fit 32 bits.
    """
    tokens, experts = scores.shape[1:]
    slots = experts * capacity
    assert slots >= tokens, f"{experts} experts of {capacity} slots do not hold {tokens} tokens"
    # Bids stay below twice the range and a step: until all slots are sold, some expert has room at its first price.
    levels = min((2**31 - 1) // (experts * slots), 2**20)
    padded = slots / tokens  # rounding costs each token a unit, steps cost each bidder theirs: S * eps in all
    step = int((levels - 2 * STEPS - 2) / (2 * STEPS * padded + 1))
    if step < 1:
        raise UserError(
            f"balanced assignment of {tokens} tokens to {experts} experts exceeds 32-bit integers: "
            "a smaller moe.group_size would fit"
        )
    units = step * padded + 1  # of an eps
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
    """True if the token's expert keeps it; otherwise its expert and bid are those of an earlier round."""
    price: Int[Array, "G E"]


def _in_units(scores: Float[Array, "G S E"], mask: Bool[Array, "G S"], units: float) -> Int[Array, "G S E"]:
    """Scores above the group's lowest, as multiples of `eps / units`; 0 for padding."""
    real = mask[..., None]
    low = jnp.min(scores, axis=(1, 2), keepdims=True, where=real, initial=jnp.inf)
    high = jnp.max(scores, axis=(1, 2), keepdims=True, where=real, initial=-jnp.inf)
    eps = jnp.maximum((high - low) / STEPS, MIN_EPS)
    amount = jnp.round((scores - low) / eps * units)
    # Whatever is not finite ends within the range too.
    return jnp.where(real & (amount > 0), jnp.minimum(amount, STEPS * units), 0).astype(jnp.int32)


def _starting_prices(score: Int[Array, "G N E"], temperature: float, highest: int) -> Int[Array, "G E"]:
    """Prices at which each expert gets as much as any other of the tokens' softmax((score - price) / temperature)."""
    kernel = jnp.exp(score.astype(jnp.float32) / temperature)
    scale = _balance_columns(kernel, jnp.ones_like(kernel[..., 0]), START_ITERATIONS)
    return jnp.clip(jnp.round(-temperature * jnp.log(scale)), 0, highest).astype(jnp.int32)


def _offers(
    score: Int[Array, "G E N"], price: Int[Array, "G E"], step: int, highest: int
) -> tuple[Int[Array, "G N"], Int[Array, "G N"]]:
    """The expert that each token would bid for, and how much.

    Of equals it takes the first, counted from its own number on, so that tokens that are alike spread out.
    """
    experts, token = score.shape[1], jnp.arange(score.shape[2])[None]
    turn = (token - jnp.arange(experts)[:, None]) % experts
    value = (score - price[..., None]) * experts + turn[None]  # all of a token's differ: the highest tells which it is
    best = jnp.max(value, axis=1)
    others = jnp.where(value == best[:, None], -(2**31), value)
    # A lone expert has no second best; any increase would do.
    second = jnp.maximum(jnp.max(others, axis=1), best - highest * experts)
    expert = (token - best) % experts
    return expert, jnp.take_along_axis(price, expert, axis=1) + best // experts - second // experts + step


def _keep_highest(
    expert: Int[Array, "G N"], bid: Int[Array, "G N"], price: Int[Array, "G E"], capacity: int, levels: int
) -> tuple[Bool[Array, "G N"], Int[Array, "G E"]]:
    """Which tokens their experts keep, C each, earlier ones first among equal bids; and the experts' new prices."""
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
    """Sends real tokens without an expert to the slots that are free, in order."""
    taken = jnp.sum(jax.nn.one_hot(jnp.where(held, expert, experts), experts, dtype=jnp.int32), axis=1)
    free = jnp.cumsum(capacity - taken, axis=1)  # slots of the experts up to each
    nth = jnp.cumsum(mask & ~held, axis=1)
    left = jax.vmap(jnp.searchsorted)(free, nth)  # the first expert up to which there are n free slots
    return jnp.where(mask, jnp.where(held, expert, left), experts)


def sinkhorn(scores: Float[Array, "G S E"], token_mask: Bool[Array, "G S"], iterations: int) -> Float[Array, "G S E"]:
    """The transport plan with the highest score plus entropy: `exp(scores)`, its rows and columns scaled.

    Rows sum to 1, those of padding to 0; columns approach equal sums as the iterations grow (Sinkhorn and Knopp 1967;
    S-BASE, Clark et al. 2022, section 3.1).

    Args:
        scores: of the experts for each token.
        token_mask: False for padding.
        iterations: of scaling the columns, then the rows.
    """
    real = token_mask[..., None]
    kernel = scores - jnp.max(scores, axis=2, keepdims=True)
    # Each row and each column then holds a 1, so no sum underflows; the floor bounds the scales where the largest
    # entries alone allow no balance.
    kernel = kernel - jnp.max(kernel, axis=1, keepdims=True, where=real, initial=-jnp.inf)
    kernel = jnp.where(real, jnp.exp(jnp.maximum(kernel, SMALLEST)), 0)
    scaled = kernel * _balance_columns(kernel, token_mask.astype(kernel.dtype), iterations)[:, None]
    return scaled / jnp.sum(jnp.where(real, scaled, 1), axis=2, keepdims=True)


def _balance_columns(kernel: Float[Array, "G S E"], rows: Float[Array, "G S"], iterations: int) -> Float[Array, "G E"]:
    """Scales of the columns under which the kernel, its rows scaled to sums `rows`, has equal column sums.

    The largest is 1.
    """

    def iterate(_: Int[Array, ""], scale: Array) -> Array:
        sums = jnp.einsum("gse,ge->gs", kernel, scale, precision=jax.lax.Precision.HIGHEST)
        per_row = jnp.where(rows > 0, rows / sums, 0)
        columns = jnp.einsum("gse,gs->ge", kernel, per_row, precision=jax.lax.Precision.HIGHEST)
        scale = jnp.where(columns > 0, 1 / columns, 1)  # a group of padding has no sums
        return scale / jnp.max(scale, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, iterations, iterate, jnp.ones_like(kernel[:, 0]))
