"""Greedy decoding, and filling in a passage with masked spans."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from switchjax.config import Config, UserError
from switchjax.data.vocabulary import EOS, PAD, Vocabulary
from switchjax.models.encoder_decoder import EncoderDecoder

SENTINEL = re.compile(r"<extra_id_\d+>")


@partial(jax.jit, static_argnames=("max_length", "num_ids"))
def greedy_decode(
    model: EncoderDecoder, tokens: Int[Array, "B L"], segments: Int[Array, "B L"], max_length: int, num_ids: int
) -> Int[Array, "B T"]:
    """The most probable next token, `max_length` times or until every row has ended.

    Args:
        model: an encoder-decoder.
        tokens: the encoder's input.
        segments: 1 for its tokens, 0 for padding.
        max_length: T.
        num_ids: ids that the vocabulary has; the model's table may be larger.

    Returns:
        Token ids up to and with EOS; padding after it.
    """
    encoded, _ = model.encode(tokens, segments, None)
    rows = tokens.shape[0]

    def not_done(carry: tuple[Array, Array, Array]) -> Array:
        position, _, ended = carry
        return (position < max_length) & ~jnp.all(ended)

    def write_next(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        position, output, ended = carry
        inputs = jnp.concatenate([jnp.full((rows, 1), PAD, output.dtype), output[:, :-1]], axis=1)
        # What is not yet written is padding: it takes no slot of an expert.
        written = jnp.broadcast_to(jnp.arange(max_length)[None] <= position, output.shape).astype(output.dtype)
        logits, _ = model.decode(encoded, segments, inputs, written, None)
        logits = jax.lax.dynamic_index_in_dim(logits, position, axis=1, keepdims=False)
        chosen = jnp.argmax(logits[:, :num_ids], axis=-1)
        chosen = jnp.where(ended, PAD, chosen.astype(output.dtype))
        output = jax.lax.dynamic_update_index_in_dim(output, chosen, position, axis=1)
        return position + 1, output, ended | (chosen == EOS)

    start = (jnp.zeros((), jnp.int32), jnp.full((rows, max_length), PAD, jnp.int32), jnp.zeros(rows, bool))
    _, output, _ = jax.lax.while_loop(not_done, write_next, start)
    return output


def fill_in(model: EncoderDecoder, vocabulary: Vocabulary, config: Config, passages: list[str]) -> list[str]:
    """Each passage with its masked spans `<extra_id_0>`, `<extra_id_1>`, ... replaced by `[the model's words]`.

    Raises:
        UserError: if a passage masks nothing or is longer than the encoder, or the model is of another family.
    """
    if config.model.family != "encoder_decoder":
        raise UserError(
            f"filling in spans takes an encoder-decoder, but this run has model.family={config.model.family}"
        )
    return [_fill_in_one(model, vocabulary, config, passage) for passage in passages]


def _fill_in_one(model: EncoderDecoder, vocabulary: Vocabulary, config: Config, passage: str) -> str:
    """One by one, since passages that are routed together would compete for the experts' buffers."""
    if not SENTINEL.search(passage):
        raise UserError(f"nothing to fill in: mark spans with <extra_id_0>, <extra_id_1>, ... in: {passage}")
    length = config.data.encoder_length
    ids = [*vocabulary.encode(passage), EOS]
    if len(ids) > length:
        raise UserError(f"a passage of {len(ids)} tokens is longer than data.encoder_length={length}")
    tokens = jnp.asarray([ids + [PAD] * (length - len(ids))], jnp.int32)
    segments = jnp.asarray([[1] * len(ids) + [0] * (length - len(ids))], jnp.int32)
    (output,) = greedy_decode(model, tokens, segments, config.data.decoder_length, vocabulary.size)
    return _insert(passage, vocabulary.decode(output.tolist()))


def _insert(passage: str, answer: str) -> str:
    """Puts the span after a sentinel's first place in `answer` in its place in `passage`; `[]` where there is none."""
    spans: dict[str, str] = {}
    for sentinel, span in zip(SENTINEL.findall(answer), SENTINEL.split(answer)[1:], strict=True):
        spans.setdefault(sentinel, span)
    return SENTINEL.sub(lambda sentinel: f"[{spans.get(sentinel.group(), '').strip()}]", passage)
