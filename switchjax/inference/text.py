"""Continues prompts and fills in passages with masked spans: text in, text out."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from switchjax.config import DecodingConfig, UserError
from switchjax.data.vocabulary import EOS, PAD
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import Pretrained
from switchjax.parallel.mesh import count_shards

SENTINEL = re.compile(r"<extra_id_\d+>")


def complete(
    pretrained: Pretrained, prompts: Sequence[str], decoding: DecodingConfig, key: PRNGKeyArray | None = None
) -> list[str]:
    """Returns the text that a decoder writes after each prompt.

    Raises:
        UserError: if the model is an encoder-decoder, or prompt and new tokens exceed its positions.
    """
    if pretrained.config.model.family == "encoder_decoder":
        raise UserError(
            "an encoder-decoder fills in spans: mark them with <extra_id_0>, <extra_id_1>, ... in the prompt"
        )
    ids = [pretrained.vocabulary.encode(prompt) for prompt in prompts]
    return complete_tokens(pretrained, ids, max(map(len, ids)), decoding, key)


def complete_tokens(
    pretrained: Pretrained,
    prompts: Sequence[list[int]],
    length: int,
    decoding: DecodingConfig,
    key: PRNGKeyArray | None = None,
) -> list[str]:
    """Like `complete`, for prompts of at most `length` token ids; compiles once for each `length`."""
    vocabulary = pretrained.vocabulary
    inputs, segments = pad_rows([[PAD, *ids] for ids in prompts], length + 1, _round_up(len(prompts)))
    batch = {"decoder_inputs": inputs, "decoder_segments": segments}
    output = np.asarray(generate(pretrained.model, batch, decoding, vocabulary.size, key))
    # New tokens are decoded together with the prompt, because decoding drops a text's leading space.
    return [
        vocabulary.decode([*ids, *new]).removeprefix(vocabulary.decode(ids))
        for ids, new in zip(prompts, output.tolist(), strict=False)
    ]


def fill_in(
    pretrained: Pretrained, passages: Sequence[str], decoding: DecodingConfig, key: PRNGKeyArray | None = None
) -> list[str]:
    """Replaces the masked spans `<extra_id_0>`, `<extra_id_1>`, ... of each passage by `[the model's words]`.

    Raises:
        UserError: if a passage has no masked span or is too long for the encoder, or the model has no encoder.
    """
    config, vocabulary = pretrained.config, pretrained.vocabulary
    if config.model.family != "encoder_decoder":
        raise UserError(
            f"filling in spans needs an encoder-decoder, but this run has model.family={config.model.family}"
        )
    for passage in passages:
        if not SENTINEL.search(passage):
            raise UserError(f"nothing to fill in: mark spans with <extra_id_0>, <extra_id_1>, ... in: {passage}")
    ids = [[*vocabulary.encode(passage), EOS] for passage in passages]
    longest = max(map(len, ids))
    if longest > config.data.encoder_length:
        raise UserError(
            f"a passage of {longest} tokens is longer than data.encoder_length={config.data.encoder_length}"
        )
    rows = _round_up(len(ids))
    tokens, encoder_segments = pad_rows(ids, config.data.encoder_length, rows)
    inputs, segments = pad_rows([[PAD]] * len(ids), 1, rows)
    batch = {
        "encoder_tokens": tokens,
        "encoder_segments": encoder_segments,
        "decoder_inputs": inputs,
        "decoder_segments": segments,
    }
    output = np.asarray(generate(pretrained.model, batch, decoding, vocabulary.size, key))
    answers = (vocabulary.decode(row) for row in output.tolist())
    return [_insert(passage, answer) for passage, answer in zip(passages, answers, strict=False)]


def pad_rows(ids: Sequence[Sequence[int]], length: int, rows: int) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """Pads texts to `rows` rows of `length` tokens; returns token ids and segments (1 for text, 0 for padding)."""
    tokens, segments = np.full((rows, length), PAD, np.int32), np.zeros((rows, length), np.int32)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        segments[row, : len(text)] = 1
    return jnp.asarray(tokens), jnp.asarray(segments)


def _round_up(rows: int) -> int:
    """The smallest number of rows, at least `rows`, that the mesh divides."""
    shards = count_shards()
    return -(-rows // shards) * shards


def _insert(passage: str, answer: str) -> str:
    """Replaces each sentinel in `passage` by the span that follows its first occurrence in `answer`, or by `[]`."""
    spans: dict[str, str] = {}
    for sentinel, span in zip(SENTINEL.findall(answer), SENTINEL.split(answer)[1:], strict=True):
        spans.setdefault(sentinel, span)
    return SENTINEL.sub(lambda sentinel: f"[{spans.get(sentinel.group(), '').strip()}]", passage)
