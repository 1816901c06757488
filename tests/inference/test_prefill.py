"""The prompt is read up to its last token, which the first step of decoding reads."""

import jax
import numpy as np

from switchjax.inference.prefill import prefill
from tests.models.families import FAMILIES, make_model

LENGTHS = np.array([5, 2, 1, 0])


def test_prompts_of_any_length_are_read_but_for_their_last_token() -> None:
    model = make_model(FAMILIES["gpt"])
    segments = (np.arange(5) < LENGTHS[:, None]).astype(np.int32)
    tokens = np.where(segments, np.random.default_rng(0).integers(1, 40, segments.shape), 0).astype(np.int32)
    batch = {"decoder_inputs": tokens, "decoder_targets": tokens, "decoder_segments": segments}
    cache, last, empty = jax.jit(prefill, static_argnums=2)(model, batch, 3)
    np.testing.assert_array_equal(cache.lengths, [4, 1, 0, 0])
    assert cache.max_length == 4 + 3
    np.testing.assert_array_equal(last[:3], [tokens[0, 4], tokens[1, 1], tokens[2, 0]])
    np.testing.assert_array_equal(empty, LENGTHS == 0)
