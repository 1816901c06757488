"""The tokens that may be drawn, and their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import DecodingConfig, UserError
from switchjax.data.vocabulary import PAD
from switchjax.inference.sampling import choose, keep_top_k, keep_top_p, mask_invalid_ids

PROBS = np.array([[0.05, 0.4, 0.2, 0.25, 0.1], [0.5, 0.1, 0.1, 0.2, 0.1]], np.float32)
LOGITS = jnp.log(PROBS)


def kept(logits: jax.Array) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


def test_only_the_most_probable_tokens_are_kept() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [[1, 3], [0, 3]]
    assert kept(keep_top_k(LOGITS, 9)) == [[0, 1, 2, 3, 4]] * 2
    assert kept(keep_top_p(LOGITS, 0.45)) == [[1, 3], [0]]
    assert kept(keep_top_p(LOGITS, 0.66)) == [[1, 2, 3], [0, 3]]
    assert kept(keep_top_p(LOGITS, 0.01)) == [[1], [0]]
    assert kept(keep_top_p(LOGITS, 0.75)) == [[1, 2, 3], [0, 1, 2, 3, 4]]  # equals of the last one are kept


def test_neither_padding_nor_what_the_vocabulary_has_not_is_written() -> None:
    logits = mask_invalid_ids(LOGITS.astype(jnp.bfloat16), 3)
    assert kept(logits) == [[1, 2]] * 2
    assert PAD == 0
    assert logits.dtype == jnp.float32


def test_greedy_is_the_most_probable_and_samples_are_as_frequent_as_probable() -> None:
    np.testing.assert_array_equal(choose(LOGITS, DecodingConfig(), jax.random.key(0)), [1, 0])

    def frequencies(decoding: DecodingConfig) -> np.ndarray:
        keys = jax.random.split(jax.random.key(1), 4000)
        drawn = np.asarray(jax.jit(jax.vmap(lambda key: choose(LOGITS, decoding, key)))(keys))
        return np.array([np.bincount(row, minlength=5) / len(keys) for row in drawn.T])

    # 4000 draws: four standard errors of a frequency are 0.032 at most.
    np.testing.assert_allclose(frequencies(DecodingConfig("sample")), PROBS, atol=0.032)
    cold = PROBS**2 / np.sum(PROBS**2, axis=1, keepdims=True)
    np.testing.assert_allclose(frequencies(DecodingConfig("sample", temperature=0.5)), cold, atol=0.032)
    two = np.where(np.sort(PROBS, axis=1)[:, -2:-1] <= PROBS, PROBS, 0)
    two /= two.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(frequencies(DecodingConfig("sample", top_k=2)), two, atol=0.032)
    # Of the two that are left, the first alone has probability 0.6, in the second row 0.7.
    np.testing.assert_array_equal(frequencies(DecodingConfig("sample", top_k=2, top_p=0.6)), PROBS >= [[0.4], [0.5]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "beams"}, "unknown value 'beams' .did you mean 'beam'"),
        ({"max_new_tokens": 0}, "decoding.max_new_tokens must be positive"),
        ({"temperature": 0.0}, "decoding.temperature must be positive"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"length_penalty": -0.5}, "length_penalty must not be negative"),
    ],
)
def test_decoding_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecodingConfig(**fields)
