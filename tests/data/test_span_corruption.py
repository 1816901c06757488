import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from switchjax.config import UserError
from switchjax.data.span_corruption import SpanCorruption
from switchjax.data.text import TextData
from switchjax.data.vocabulary import EOS
from tests.data.spans import restore

FIRST_SENTINEL = 999
T5 = SpanCorruption(0.15, 3.0, FIRST_SENTINEL, 512, 114)


LOWEST_SENTINEL = 600

settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=150)
rooms = st.integers(8, 300)
anything = st.builds(SpanCorruption, st.floats(0.01, 0.99), st.floats(1.0, 8.0), st.just(FIRST_SENTINEL), rooms, rooms)


def test_t5_lengths() -> None:
    assert T5.max_tokens == 568
    np.testing.assert_array_equal(T5.lengths(np.array([568])), [[512], [114]])
    assert T5.num_noise(np.array([568])) == (85, 28)


@settings
@hypothesis.given(anything, st.integers(2, 600), st.integers(0, 2**32 - 1))
def test_corruption_inverts(corruption: SpanCorruption, length: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(3, 600, length)
    inputs, targets = corruption.example(tokens, np.random.default_rng(seed)).values()
    noise, spans = (number.item() for number in corruption.num_noise(np.array([length])))
    hypothesis.assume(spans <= FIRST_SENTINEL + 1 - LOWEST_SENTINEL)
    np.testing.assert_array_equal(restore(inputs, targets, LOWEST_SENTINEL), tokens)
    assert [[len(inputs)], [len(targets)]] == corruption.lengths(np.array([length])).tolist()
    assert inputs[-1] == targets[-1] == EOS
    assert len(targets) - spans - 1 == noise
    sentinels = FIRST_SENTINEL - np.arange(spans)
    np.testing.assert_array_equal(inputs[inputs >= 600], sentinels)
    np.testing.assert_array_equal(targets[targets >= 600], sentinels)
    assert targets[0] >= 600
    assert inputs[0] < 600  # A text never begins with noise,
    assert inputs[-2] >= 600  # and always ends with it.


@settings
@hypothesis.given(anything)
def test_the_longest_chunk_fits_and_a_longer_one_does_not(corruption: SpanCorruption) -> None:
    longest = corruption.max_tokens
    lengths = corruption.lengths(np.arange(2, longest + 2))
    room = np.array([corruption.encoder_length, corruption.decoder_length])
    assert (room >= lengths[:, :-1].T).all()
    assert (lengths[:, -1] > room).any()


def test_noise_is_fifteen_percent_in_spans_of_three() -> None:
    rng = np.random.default_rng(0)
    noise = np.zeros(200)
    for _ in range(2000):
        inputs = T5.example(np.arange(3, 203), rng)["encoder"]
        noise += ~np.isin(np.arange(3, 203), inputs)
    assert noise.sum() == 2000 * 30
    # Away from the ends every position is as likely; 5 standard errors of a proportion from 2000 draws.
    np.testing.assert_allclose(noise[20:-20] / 2000, 0.15, atol=5 * np.sqrt(0.15 * 0.85 / 2000))


def test_same_generator_same_spans() -> None:
    first, second, other = (T5.example(np.arange(3, 203), np.random.default_rng(seed))["encoder"] for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_lengths_too_short_for_any_text() -> None:
    with pytest.raises(UserError, match=r"encoder_length=2 .* at least 3 and 3"):
        _ = dataclasses.replace(T5, encoder_length=2, decoder_length=50).max_tokens


def test_restores_real_text(data: TextData) -> None:
    batch = next(data.train_batches())
    for row in range(8):
        for segment in range(1, batch["encoder_segments"][row].max() + 1):
            inputs = batch["encoder_tokens"][row][batch["encoder_segments"][row] == segment]
            targets = batch["decoder_targets"][row][batch["decoder_segments"][row] == segment]
            text = data.vocabulary.decode(
                restore(inputs, targets, data.vocabulary.size - data.vocabulary.num_sentinels)
            )
            assert "<extra_id" not in text
            assert len(text) > 1
