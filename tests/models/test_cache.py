"""A text that is read into a cache piece by piece has the same logits as the whole text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, UserError
from switchjax.inference.pretrained import dropless
from switchjax.models.families import TextModel
from switchjax.models.model import Batch
from tests.models import examples
from tests.models.families import FAMILIES, TEXT, make_model
from tests.tiny import changed

LENGTHS = np.array([10, 7, 4, 1])
"""Number of tokens of each text."""
PIECE = 3
"""Largest number of tokens that are read at a time."""

T5 = examples.changed(jitter_noise=0.0, expert_dropout=0.0)
ENCODER_DECODERS = {
    "t5": T5,
    "t5 rotary": examples.changed(T5, positions="rotary", num_kv_heads=2, pattern=("dense",), scale_scores=True),
    "switch attention": examples.changed(T5, pattern=("dense", "switch_attention")),
}
CONFIGS: dict[str, Config] = {
    **{name: FAMILIES[name] for name in TEXT},
    "no positions, window": changed(FAMILIES["gpt"], model={"positions": "none", "sliding_window": 3}),
    **ENCODER_DECODERS,
}
EVERYDAY = {"gpt", "mixtral", "glam", "lstm", "t5", "switch attention"}


def make_texts(config: Config) -> Batch:
    """Texts of lengths `LENGTHS`, each in its own row."""
    rng, length = np.random.default_rng(1), LENGTHS.max()
    shape = (len(LENGTHS), length)
    segments = (np.arange(length) < LENGTHS[:, None]).astype(np.int32)
    tokens = np.where(segments > 0, rng.integers(1, config.model.vocab_size, shape), 0).astype(np.int32)
    batch = {"decoder_inputs": tokens, "decoder_segments": segments}
    if config.model.family == "encoder_decoder":
        encoded = rng.integers(1, config.model.vocab_size, (len(LENGTHS), 8)).astype(np.int32)
        masked = (np.arange(8) < np.array([[8], [3], [6], [1]])).astype(np.int32)
        batch |= {"encoder_tokens": encoded, "encoder_segments": masked}
    return jax.tree.map(jnp.asarray, batch)


def make_pieces() -> np.ndarray:
    """The number of tokens of each text to read at each step, sometimes 0: [steps, B]."""
    rng, left, pieces = np.random.default_rng(2), LENGTHS.copy(), []
    while left.any():
        pieces.append(np.minimum(rng.integers(0, PIECE + 1, len(left)), left))
        left = left - pieces[-1]
    return np.array(pieces)


@jax.jit
def whole_and_piecewise(
    model: TextModel, batch: Batch, tokens: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits, _ = model(batch, None)

    def read(cache: Any, piece: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        logits, cache = model.extend(*piece, cache)
        return cache, logits

    cache, pieces = jax.lax.scan(read, model.start(batch, int(LENGTHS.max())), (tokens, masks))
    return logits, pieces, cache.lengths


@pytest.mark.parametrize(
    "name", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_logits_with_a_cache_are_those_without(name: str) -> None:
    config = dropless(CONFIGS[name])
    model, batch, counts = make_model(config), make_texts(config), make_pieces()
    masks = np.arange(PIECE) < counts[..., None]
    tokens = np.full(masks.shape, 9, np.int32)  # padding may be anything
    offsets = np.cumsum(counts, axis=0) - counts
    for step, row in np.ndindex(*counts.shape):
        first, count = offsets[step, row], counts[step, row]
        tokens[step, row, :count] = batch["decoder_inputs"][row, first : first + count]
    arrays = {n: jnp.asarray(values) for n, values in batch.items()}
    arrays = (
        arrays if config.model.family == "encoder_decoder" else arrays | {"decoder_targets": arrays["decoder_inputs"]}
    )
    expected, pieces, lengths = whole_and_piecewise(model, arrays, jnp.asarray(tokens), jnp.asarray(masks))
    np.testing.assert_array_equal(lengths, LENGTHS)
    assert np.std(expected) > 0.1, "logits that say nothing"
    for row, length in enumerate(LENGTHS):
        read = np.asarray(pieces)[:, row][masks[:, row]]
        # float32, sums in another order; relative to the largest logit.
        np.testing.assert_allclose(read, expected[row, :length], rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_cache_holds_no_more_positions_than_the_model_has_learned() -> None:
    model, batch = make_model(FAMILIES["gpt"]), make_texts(FAMILIES["gpt"])
    with pytest.raises(UserError, match=r"17 tokens exceed the model.max_length=16"):
        model.start(batch, 17)


def test_beams_change_places_within_their_row_alone() -> None:
    config = T5
    model, batch = make_model(config), make_texts(config)

    @jax.jit
    def caches(model: TextModel, batch: Batch, beams: jax.Array) -> tuple[Any, Any]:
        cache = model.start(batch, 4).repeat(2)
        tokens = jnp.arange(8)[:, None] + 3
        _, cache = model.extend(tokens, jnp.ones_like(tokens, bool), cache)
        return cache, cache.select(beams)

    beams = jnp.asarray([[1, 0], [0, 0], [1, 1], [0, 1]])
    before, after = caches(model, batch, beams)
    rows = np.array([1, 0, 2, 2, 5, 5, 6, 7])
    keys, moved = (np.asarray(cache.layers[0][0].state.keys) for cache in (before, after))
    assert not np.allclose(keys[:, 0], keys[:, 1])
    np.testing.assert_array_equal(moved, keys[:, rows])
    # What the encoder read is the same for all beams of a row, and stays.
    np.testing.assert_array_equal(after.layers[0][0].cross.keys, before.layers[0][0].cross.keys)
    np.testing.assert_array_equal(before.layers[0][0].cross.keys[:, ::2], before.layers[0][0].cross.keys[:, 1::2])
