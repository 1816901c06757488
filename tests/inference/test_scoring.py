"""Scores against sums by hand, and what benchmarks make of them."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MeshConfig, UserError
from switchjax.data.vocabulary import EOS, PAD
from switchjax.inference import scoring
from switchjax.inference.pretrained import Pretrained
from switchjax.inference.scoring import Question, Score, few_shot, multiple_choice, perplexity, score
from switchjax.models.model import Batch
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings
from tests.inference.letters import make_pretrained
from tests.models import examples
from tests.models.families import FAMILIES, forward

GLAM = FAMILIES["glam"]


@pytest.fixture(scope="module")
def decoder() -> Pretrained:
    return make_pretrained(GLAM)


def log_prob(pretrained: Pretrained, context: str, continuation: str) -> tuple[float, bool]:
    """By hand, one text at a time."""
    ids = pretrained.vocabulary.encode(context + continuation)
    inputs, segments = np.zeros((2, 1, 16), np.int32)  # of one length, so that it is compiled once
    inputs[0, : len(ids)], segments[0, : len(ids)] = [PAD, *ids[:-1]], 1
    logits = forward(pretrained.model, {"decoder_inputs": inputs, "decoder_segments": segments}, None)[0]
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    chosen = range(len(context), len(ids))
    return sum(log_probs[i, ids[i]] for i in chosen), all(log_probs[i].argmax() == ids[i] for i in chosen)


PAIRS = [("abc", "de"), ("", "bad"), ("abca", "c"), ("c", "dddddddd")]


def test_a_score_is_the_sum_of_the_continuations_log_probabilities(decoder: Pretrained) -> None:
    scores = score(decoder, PAIRS, rows=3)  # the last batch is filled up
    for (context, continuation), found in zip(PAIRS, scores, strict=True):
        expected, _ = log_prob(decoder, context, continuation)
        # float32 log-probabilities, summed over a few layers in another order.
        assert found.log_prob == pytest.approx(expected, rel=1e-4)
        assert found.num_tokens == len(continuation)


def test_what_greedy_decoding_writes_is_called_greedy(decoder: Pretrained) -> None:
    texts = [("ab", letter) for letter in "abcdefgh"]
    best = [log_prob(decoder, *pair)[1] for pair in texts]
    assert [found.is_greedy for found in score(decoder, texts)] == best


def test_the_beginning_of_a_long_context_is_left_out_with_a_warning(
    decoder: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    whole = score(decoder, [("bcdeabcdea", "cd")], rows=3)
    with caplog.at_level(logging.WARNING):
        cut = score(decoder, [("aaaabcdeabcdea", "cd")], rows=3)
    assert cut == whole
    assert "cut the beginning of 1 of 1 contexts" in caplog.text
    with pytest.raises(UserError, match="1 to 12 tokens, this one has 13"):
        score(decoder, [("a", "b" * 13)], rows=3)
    with pytest.raises(UserError, match="this one has 0"):
        score(decoder, [("a", "")], rows=3)


def test_an_encoder_decoder_reads_the_context_and_predicts_the_continuation() -> None:
    pretrained = make_pretrained(examples.changed(jitter_noise=0.0, expert_dropout=0.0))
    ((found, num_tokens, _),) = score(pretrained, [("abc", "de")], rows=2)
    encode = pretrained.vocabulary.encode
    batch: Batch = {
        "encoder_tokens": jnp.asarray([[*encode("abc"), EOS]]),
        "encoder_segments": jnp.ones((1, 4), int),
        "decoder_inputs": jnp.asarray([[PAD, *encode("d")]]),
        "decoder_segments": jnp.ones((1, 2), int),
    }
    log_probs = np.asarray(jax.nn.log_softmax(forward(pretrained.model, batch, None)[0], axis=-1))
    assert found == pytest.approx(sum(log_probs[i, token] for i, token in enumerate(encode("de"))), rel=1e-4)
    assert num_tokens == 2
    with pytest.raises(UserError, match="cannot score a text without context"):
        perplexity(pretrained, ["abc"])


def test_perplexity_counts_every_token_once(decoder: Pretrained) -> None:
    texts = ["abcdeabcdeabcde", "edc"]  # the first one takes two rows of 12
    results = perplexity(decoder, texts, rows=3)
    total = sum(log_prob(decoder, "", part)[0] for part in ("abcdeabcdeab", "cde", "edc"))
    assert results["target_tokens"] == 18
    assert results["neg_log_perplexity"] == pytest.approx(total / 18, rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(-total / np.log(2) / 18, rel=1e-4)


@pytest.mark.slow
def test_scores_on_a_mesh_are_those_of_one_device(decoder: Pretrained) -> None:
    expected = score(decoder, PAIRS)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = replace(decoder, model=jax.device_put(decoder.model, parameter_shardings(decoder.model, mesh)))
    with jax.set_mesh(mesh):
        for found, wanted in zip(score(placed, PAIRS), expected, strict=True):
            assert found == (pytest.approx(wanted.log_prob, rel=1e-4), *wanted[1:])


def test_rows_that_do_not_divide_over_the_mesh_are_refused(decoder: Pretrained) -> None:
    with jax.set_mesh(make_mesh(MeshConfig(2, 4))), pytest.raises(UserError, match="3 rows do not divide over the 8"):
        score(decoder, PAIRS, rows=3)


QUESTIONS = [Question(f"{n} is", (" even", " odd, I say"), n % 2) for n in range(8)]


def test_shots_are_drawn_without_the_question_itself_and_the_same_again() -> None:
    prompted = few_shot(QUESTIONS, QUESTIONS, num_shots=3, seed=1)
    assert prompted == few_shot(QUESTIONS, QUESTIONS, num_shots=3, seed=1)
    assert prompted != few_shot(QUESTIONS, QUESTIONS, num_shots=3, seed=2)
    assert prompted[2:] != few_shot(QUESTIONS[2:], QUESTIONS, num_shots=3, seed=1)
    for question, shown in zip(QUESTIONS, prompted, strict=True):
        *shots, last = shown.context.split("\n\n")
        assert last == question.context
        assert len(set(shots)) == 3
        assert set(shots) <= {other.solved for other in QUESTIONS if other != question}
        assert replace(shown, context=question.context) == question
    assert few_shot(QUESTIONS, [], num_shots=0) == QUESTIONS
    with pytest.raises(UserError, match="cannot draw 8 shots from a pool of 7 other questions"):
        few_shot(QUESTIONS, QUESTIONS, num_shots=8)


def test_the_choice_is_the_most_probable_or_the_most_probable_a_byte(
    decoder: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    # log P of the two choices: the short one is the more probable, the long one the more probable a byte.
    found = {" even": -3.0, " odd, I say": -4.0}
    monkeypatch.setattr(scoring, "score", lambda _, pairs, *rest: [Score(found[after], 1, False) for _, after in pairs])
    results = multiple_choice(decoder, QUESTIONS[:5])
    assert results == {"accuracy": 3 / 5, "accuracy_per_byte": 2 / 5, "questions": 5.0}


def test_a_benchmark_is_a_page(decoder: Pretrained) -> None:
    questions = [Question(c, ("ab", "cd"), 0) for c in ("a", "b")]
    results = multiple_choice(decoder, few_shot(questions, questions, num_shots=1, separator=""), rows=3)
    direct = [[log_prob(decoder, f"{shot}ab{own}", choice)[0] for choice in ("ab", "cd")] for own, shot in ("ab", "ba")]
    assert results["accuracy"] == np.mean(np.argmax(direct, axis=1) == 0)
