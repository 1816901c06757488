"""Beam search."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchjax.config import DecodingConfig
from switchjax.data.vocabulary import PAD
from switchjax.inference.prefill import prefill
from switchjax.inference.sampling import mask_invalid_ids, top_k
from switchjax.models.cache import Cache
from switchjax.models.families import TextModel
from switchjax.models.model import Batch

Beams = tuple[Float[Array, "B K"], Int[Array, "B K T"]]
"""The scores and tokens of K texts for each row."""


def length_penalty(tokens: int | Int[Array, ""], alpha: float) -> Float[Array, ""]:
    """The divisor of a text's log-probability: `((5 + tokens) / 6)^alpha` (Wu et al. 2016, eq. 14)."""
    return ((5.0 + jnp.asarray(tokens, jnp.float32)) / 6.0) ** alpha


def beam_search(model: TextModel, batch: Batch, decoding: DecodingConfig, num_ids: int, eos: int) -> Beams:
    """Finds K texts for each row, best first; a score is the log-probability (nats) over the length penalty.

    The search extends K live texts of each row. A text that ends leaves them, and the K best ended texts are kept. A
    row's search stops when no live text can still score better than the worst of these. If fewer than K texts end, the
    remaining scores are -inf; if none ends, the result is the live texts.

    Args:
        model: as in `switchjax.inference.decoding.generate`.
        batch: the prompts, as there.
        decoding: K is `num_beams`, T is `max_new_tokens`.
        num_ids: number of ids in the vocabulary.
        eos: the token that ends a text.
    """
    count, length, alpha = decoding.num_beams, decoding.max_new_tokens, decoding.length_penalty
    cache, last, empty = prefill(model, batch, length)
    rows = last.shape[0]
    # All beams start from the same prompt. Without the -inf, all K would choose the same first token.
    scores = jnp.where(jnp.arange(count)[None] == 0, jnp.zeros((rows, 1)), -jnp.inf)
    texts = jnp.full((rows, count, length), PAD, jnp.int32)
    # An empty row counts as ended with score 0, which no live text exceeds: its search never starts.
    ended = jnp.where(jnp.broadcast_to(empty[:, None], (rows, count)), 0.0, -jnp.inf), texts
    Carry = tuple[Array, Array, Array, Beams, Beams, Cache]

    def open_rows(live: Beams, ended: Beams) -> Array:
        # An upper bound of what live texts can reach: log-probabilities, which are negative, only fall, and the
        # longest text has the largest divisor.
        return jnp.max(live[0], axis=1) / length_penalty(length, alpha) > jnp.min(ended[0], axis=1)

    def is_open(carry: Carry) -> Array:
        step, _, row_open, _, _, _ = carry
        return (step < length) & jnp.any(row_open)

    def extend(carry: Carry) -> Carry:
        step, last, row_open, (scores, texts), ended, cache = carry
        mask = jnp.repeat(row_open, count)[:, None]
        # Rows whose search has stopped are padding: they take no slot of an expert.
        logits, cache = model.extend(last.reshape(-1, 1), mask, cache)
        log_probs = jax.nn.log_softmax(mask_invalid_ids(logits[:, 0], num_ids), axis=-1).reshape(rows, count, -1)
        ids = log_probs.shape[-1]
        # At most K of 2 K candidates end (each beam has one EOS), so at least K go on.
        best, index = top_k((scores[..., None] + log_probs).reshape(rows, -1), min(2 * count, count * ids))
        parent, token = index // ids, index % ids
        texts = jax.lax.dynamic_update_index_in_dim(_take(texts, parent), token, step, axis=2)
        ends = token == eos
        done = jnp.where(ends, best / length_penalty(step + 1, alpha), -jnp.inf), texts
        ended_scores, ended_texts = (jnp.concatenate(pair, axis=1) for pair in zip(ended, done, strict=True))
        ended_scores, kept = top_k(ended_scores, count)
        ended = ended_scores, _take(ended_texts, kept)
        scores, chosen = top_k(jnp.where(ends, -jnp.inf, best), count)
        live = scores, _take(texts, chosen)
        cache = cache.select(_take(parent, chosen))
        return step + 1, _take(token, chosen), open_rows(live, ended), live, ended, cache

    last = jnp.broadcast_to(last[:, None], (rows, count))
    live = scores, texts
    carry = (jnp.zeros((), jnp.int32), last, open_rows(live, ended), live, ended, cache.repeat(count))
    _, _, _, (scores, texts), ended, _ = jax.lax.while_loop(is_open, extend, carry)
    has_ended = ended[0][:, :1] > -jnp.inf
    scores = jnp.where(has_ended, ended[0], scores / length_penalty(length, alpha))
    return scores, jnp.where(has_ended[..., None], ended[1], texts)


def _take(x: Array, index: Int[Array, "B K"]) -> Array:
    """The entries `index` of each row of `x`."""
    return jax.vmap(lambda row, at: row[at])(x, index)
