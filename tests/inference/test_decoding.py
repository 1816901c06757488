"""Greedy decoding against decoding step by step, and the answer's way back into the passage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, UserError
from switchjax.data.vocabulary import EOS, PAD, Vocabulary
from switchjax.inference.decoding import _insert, fill_in, greedy_decode
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.families import build
from switchjax.parallel.sharding import named_leaves, with_leaves

CONFIG = Config(
    model=ModelConfig(
        vocab_size=32, d_model=16, d_ff=32, num_heads=2, d_head=8, num_encoder_layers=2, num_decoder_layers=2
    ),
    moe=MoEConfig(num_experts=4, group_size=8),
    data=DataConfig(vocabulary_size=16, num_sentinels=4, encoder_length=8),
)


@pytest.fixture(scope="module")
def model() -> EncoderDecoder:
    return build(CONFIG, jax.random.key(0))


def naive(model: EncoderDecoder, tokens: jax.Array, segments: jax.Array, length: int) -> np.ndarray:
    """Decodes by asking for one more token at a time, with the written prefix alone."""
    encoded, _ = model.encode(tokens, segments, None)
    output = np.full((tokens.shape[0], length), PAD)
    ended = np.zeros(tokens.shape[0], bool)
    for position in range(length):
        inputs = np.concatenate([np.full((len(output), 1), PAD), output[:, :-1]], axis=1)
        written = np.broadcast_to(np.arange(length) <= position, output.shape).astype(np.int32)
        logits, _ = model.decode(encoded, segments, jnp.asarray(inputs), jnp.asarray(written), None)
        chosen = np.where(ended, PAD, np.asarray(logits[:, position]).argmax(-1))
        output[:, position] = chosen
        ended |= chosen == EOS
    return output


def test_greedy_decoding_equals_one_token_at_a_time(model: EncoderDecoder) -> None:
    tokens = jax.random.randint(jax.random.key(1), (3, 8), 3, 32)
    segments = jnp.ones_like(tokens).at[1, 5:].set(0)
    output = greedy_decode(model, tokens, segments, 8, num_ids=32)
    np.testing.assert_array_equal(output, naive(model, tokens, segments, 8))


def test_decoding_stops_at_eos(model: EncoderDecoder) -> None:
    # Every vector but that of EOS is 0, and EOS' is large: it wins the argmax from where its logit is positive.
    vectors = jnp.zeros((32, 16)).at[EOS].set(10 * model.embedding.vectors[...][EOS])
    vectors = vectors.at[PAD].set(model.embedding.vectors[...][PAD])
    ending = with_leaves(model, named_leaves(model) | {"embedding/vectors": vectors})
    tokens = jax.random.randint(jax.random.key(2), (3, 8), 3, 32)
    segments = jnp.ones_like(tokens)
    output = np.asarray(greedy_decode(ending, tokens, segments, 8, num_ids=32))
    np.testing.assert_array_equal(output, naive(ending, tokens, segments, 8))
    ended = np.cumsum(output == EOS, axis=1) > 0
    assert ended.any()
    assert (output[ended] != EOS).sum() == (output[:, 1:][ended[:, :-1]] == PAD).sum()


def test_the_answer_goes_back_into_the_passage() -> None:
    answer = "<extra_id_0> beginning <extra_id_1> heaven and the earth <extra_id_2> <extra_id_0> end"
    passage = "In the <extra_id_0> God created the <extra_id_1>. And <extra_id_3>"
    assert _insert(passage, answer) == "In the [beginning] God created the [heaven and the earth]. And []"


class Words(Vocabulary):
    """One id a word."""

    def __init__(self) -> None:
        """Without a model."""

    def encode(self, text: str) -> list[int]:
        return [3] * len(text.split())


@pytest.mark.parametrize(
    ("passage", "message"),
    [("no mask", "nothing to fill in"), ("<extra_id_0> " * 9, "longer than data.encoder_length=8")],
)
def test_passages_that_cannot_be_filled_in_are_refused(model: EncoderDecoder, passage: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill_in(model, Words(), CONFIG, [passage])
