"""Decoding with a cache against asking the whole model for one more token at a time."""

import itertools
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import Config, DecodingConfig, MeshConfig, UserError
from switchjax.data.vocabulary import EOS, PAD
from switchjax.inference import decoding as module
from switchjax.inference.beam import beam_search, length_penalty
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless
from switchjax.models.families import TextModel
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings, partition_spec
from tests.models import examples
from tests.models.families import FAMILIES, forward, make_model
from tests.tiny import changed

T5 = dropless(examples.changed(jitter_noise=0.0, expert_dropout=0.0))
GPT = dropless(FAMILIES["gpt"])
MIXTRAL = dropless(FAMILIES["mixtral"])
LSTM = dropless(FAMILIES["lstm"])
IDS = 40
"""Number of ids in the vocabulary, of the 48 rows of the models' tables."""

Batch = dict[str, Any]


def make_prompts(config: Config, rows: int = 4) -> Batch:
    """Prompts of unequal length, the last row none at all; of an encoder-decoder, inputs of unequal length."""
    rng = np.random.default_rng(3)
    if config.model.family == "encoder_decoder":
        tokens = rng.integers(3, IDS, (rows, 8)).astype(np.int32)
        lengths = np.arange(rows)[:, None] + 4
        encoder = (np.arange(8) < np.minimum(lengths, 8)).astype(np.int32)
        encoder[-1] = 0
        inputs = np.zeros((rows, 1), np.int32)
        batch = {"encoder_tokens": np.where(encoder > 0, tokens, PAD), "encoder_segments": encoder}
    else:
        inputs = rng.integers(3, IDS, (rows, 6)).astype(np.int32)
        inputs[:, 0] = PAD
        batch = {}
    lengths = np.array([*([1, 4, 6] * rows)[: rows - 1], 0])[:, None]
    segments = (np.arange(inputs.shape[1]) < lengths).astype(np.int32)
    batch |= {"decoder_inputs": np.where(segments > 0, inputs, PAD), "decoder_segments": segments}
    return jax.tree.map(jnp.asarray, batch)


def step_by_step(model: TextModel, prompts: Batch, length: int) -> np.ndarray:
    """Greedy decoding of each row that has a prompt by the whole model, over and over."""
    inputs, segments = np.asarray(prompts["decoder_inputs"]), np.asarray(prompts["decoder_segments"])
    rows, width = inputs.shape[0], inputs.shape[1] + length
    texts = [inputs[row, : segments[row].sum()].tolist() for row in range(rows)]
    written: list[list[int]] = [[] for _ in texts]
    for _ in range(length):
        tokens, real = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text + written[row])] = text + written[row]
            real[row, : len(text + written[row])] = 1
        logits = np.array(forward(model, prompts | {"decoder_inputs": tokens, "decoder_segments": real}, None))
        logits[..., IDS:] = logits[..., PAD] = -np.inf
        for row, text in enumerate(texts):
            if text:
                written[row].append(int(logits[row, len(text + written[row]) - 1].argmax()))
    return np.array([row + [PAD] * (length - len(row)) for row in written])


@pytest.mark.parametrize(
    "config",
    [T5, MIXTRAL, pytest.param(LSTM, marks=pytest.mark.slow), pytest.param(GPT, marks=pytest.mark.slow)],
    ids=lambda config: f"{config.model.family} {config.model.positions}",
)
def test_greedy_decoding_is_one_token_at_a_time_and_stops_at_eos(config: Config) -> None:
    model, prompts = make_model(config), make_prompts(config)
    expected = step_by_step(model, prompts, 6)
    eos = int(expected[1, 2])
    after = np.cumsum(expected == eos, axis=1) - (expected == eos) > 0
    assert after[1].any()
    output = np.asarray(generate(model, prompts, DecodingConfig(max_new_tokens=6), IDS, eos=eos))
    np.testing.assert_array_equal(output, np.where(after, PAD, expected))
    np.testing.assert_array_equal(output[-1], PAD)  # no prompt, no text


def test_equal_shapes_are_compiled_once() -> None:
    model = make_model(LSTM)
    module._generate.clear_cache()
    for rows in (make_prompts(LSTM), make_prompts(LSTM) | {"decoder_segments": jnp.ones((4, 6), int)}):
        generate(model, rows, DecodingConfig(max_new_tokens=6), IDS)
    assert module._generate._cache_size() == 1


def test_rows_that_have_ended_and_empty_rows_take_no_slot() -> None:
    # One buffer of one slot an expert for all rows: each takes it from those after it.
    config = changed(FAMILIES["glam"], moe={"group_size": 24, "eval_capacity_factor": 0.01, "min_expert_capacity": 1})
    model, prompts = make_model(config), make_prompts(config)
    order = np.array([3, 0, 0, 0])  # the empty row first, then the same prompt; the slots go to the first of these
    crowded = {name: rows[order] for name, rows in prompts.items()}
    alone = {name: rows[np.array([0, 3, 3, 3])] for name, rows in prompts.items()}
    decoding = DecodingConfig(max_new_tokens=4)
    output = np.asarray(generate(model, crowded, decoding, IDS, eos=-1))
    np.testing.assert_array_equal(output[1], np.asarray(generate(model, alone, decoding, IDS, eos=-1))[0])


@pytest.mark.parametrize(
    ("config", "shape", "method"),
    [
        (T5, (2, 2, 2), "greedy"),
        pytest.param(MIXTRAL, (2, 2, 2), "sample", marks=pytest.mark.slow),
        pytest.param(T5, (2, 4, 1), "beam", marks=pytest.mark.slow),
        pytest.param(LSTM, (2, 2, 2), "beam", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.model.family if isinstance(value, Config) else str(value),
)
def test_decoding_on_a_mesh_is_that_of_one_device(config: Config, shape: tuple[int, int, int], method: str) -> None:
    model, prompts = make_model(config), make_prompts(config, rows=8)
    decoding = DecodingConfig(method, max_new_tokens=4, num_beams=2)
    expected = generate(model, prompts, decoding, IDS)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        placed = jax.device_put(prompts, NamedSharding(mesh, partition_spec("batch")))
        output = generate(jax.device_put(model, parameter_shardings(model, mesh)), placed, decoding, IDS)
    np.testing.assert_array_equal(output, expected)


def test_rows_that_do_not_divide_over_the_mesh_are_refused() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(2, 4))), pytest.raises(UserError, match="4 rows do not divide over the 8"):
        generate(make_model(T5), make_prompts(T5), DecodingConfig(), IDS)


@cache
def all_texts(length: int, num_ids: int) -> list[tuple[int, ...]]:
    """Every text of up to `length` tokens that ends with EOS, and those of `length` that do not."""
    others = [token for token in range(num_ids) if token not in (PAD, EOS)]
    ended = [(*text, EOS) for n in range(length) for text in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=length))


def log_probs_of(model: TextModel, prompt: Batch, texts: list[tuple[int, ...]], num_ids: int) -> np.ndarray:
    """log P of each text after the prompt of one row, by the whole model."""
    start = prompt["decoder_inputs"][0, : prompt["decoder_segments"][0].sum()].tolist()
    width = len(start) + max(map(len, texts))
    inputs, segments = np.zeros((2, len(texts), width), np.int32)
    for row, text in enumerate(texts):
        inputs[row, : len(start) + len(text)] = [*start, *text]
        segments[row, : len(start) + len(text)] = 1
    repeated = {name: np.repeat(rows, len(texts), axis=0) for name, rows in prompt.items()}
    logits = np.array(forward(model, repeated | {"decoder_inputs": inputs, "decoder_segments": segments}, None))
    logits[..., num_ids:] = logits[..., PAD] = -np.inf
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
    first = len(start) - 1
    return np.array([sum(log_probs[r, first + i, t] for i, t in enumerate(text)) for r, text in enumerate(texts)])


def python_beam_search(
    score: dict[tuple[int, ...], float], decoding: DecodingConfig, num_ids: int
) -> list[tuple[float, tuple[int, ...]]]:
    """As `beam_search`, over log-probabilities of all prefixes."""
    beams, done = [()], []
    penalty = [((5 + n) / 6) ** decoding.length_penalty for n in range(decoding.max_new_tokens + 1)]
    for step in range(1, decoding.max_new_tokens + 1):
        candidates = [(*beam, token) for beam in beams for token in range(1, num_ids)]
        candidates = sorted(candidates, key=lambda text: -score[text])[: 2 * decoding.num_beams]
        done += [(score[text] / penalty[step], text) for text in candidates if text[-1] == EOS]
        done = sorted(done, reverse=True)[: decoding.num_beams]
        beams = [text for text in candidates if text[-1] != EOS][: decoding.num_beams]
        if len(done) == decoding.num_beams and score[beams[0]] / penalty[-1] <= done[-1][0]:
            break
    return done or [(score[beam] / penalty[-1], beam) for beam in beams]


@pytest.mark.parametrize("config", [T5, pytest.param(MIXTRAL, marks=pytest.mark.slow)], ids=["t5", "mixtral"])
def test_wide_beam_search_finds_the_best_of_all_texts_and_a_narrow_one_what_the_algorithm_finds(config: Config) -> None:
    model, num_ids, length, rows = make_model(config), 5, 3, 3
    prompts = {name: some[:-1] for name, some in make_prompts(config, rows=rows + 1).items()}
    texts = sorted({text[:n] for text in all_texts(length, num_ids) for n in range(1, length + 1)})
    search = jax.jit(beam_search, static_argnums=(2, 3, 4))
    for num_beams, alpha in ((40, 0.6), (3, 2.0)):
        decoding = DecodingConfig("beam", length, num_beams=num_beams, length_penalty=alpha)
        scores, found = search(model, prompts, decoding, num_ids, EOS)
        for row in range(rows):
            prompt = {name: some[row : row + 1] for name, some in prompts.items()}
            score = dict(zip(texts, log_probs_of(model, prompt, texts, num_ids), strict=True))
            if num_beams == 40:
                ended = [(score[t] / float(length_penalty(len(t), alpha)), t) for t in texts if t[-1] == EOS]
                expected = sorted(ended, reverse=True)
                assert len(expected) == 13
            else:
                expected = python_beam_search(score, decoding, num_ids)
            count = len(expected)
            padded = [[*text, *[PAD] * (length - len(text))] for _, text in expected]
            np.testing.assert_array_equal(found[row, :count], padded)
            # float32 log-probabilities, summed.
            np.testing.assert_allclose(scores[row, :count], [value for value, _ in expected], rtol=1e-4)
            assert np.all(np.isneginf(scores[row, count:]))
