"""Scores texts by their probability under a model, and answers multiple-choice benchmarks with the scores.

A benchmark is a list of questions, for instance

    questions = [Question("The sky is", (" blue.", " green."), answer=0), ...]
    with jax.set_mesh(mesh):
        print(multiple_choice(load_pretrained(workdir, mesh), few_shot(questions, pool, num_shots=5, seed=0)))
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from switchjax.config import UserError
from switchjax.data.vocabulary import EOS, PAD
from switchjax.inference.pretrained import Pretrained
from switchjax.inference.text import pad_rows
from switchjax.models.families import TextModel
from switchjax.models.model import Batch
from switchjax.parallel.mesh import count_shards, one_at_a_time
from switchjax.training.objective import target_log_probs

_log = logging.getLogger(__name__)


class Score(NamedTuple):
    """A continuation's total log-probability (nats), its tokens, and whether greedy decoding would write it."""

    log_prob: float
    num_tokens: int
    is_greedy: bool


class Request(NamedTuple):
    """Token ids to score after those of a context; an encoder-decoder reads the context in its encoder."""

    context: list[int]
    continuation: list[int]


def score(pretrained: Pretrained, pairs: Iterable[tuple[str, str]], rows: int = 8, length: int = 0) -> list[Score]:
    """Scores (context, continuation) pairs: `log P(continuation | context)`, one forward pass per batch.

    A space between the two belongs to the continuation. An encoder-decoder reads the context in its encoder, so both
    texts may contain masked spans (`<extra_id_0>`).

    Args:
        pretrained: the model.
        pairs: texts; an empty context is allowed.
        rows: rows in a batch.
        length: largest number of tokens in context and continuation together (in each, for an encoder-decoder); a
            longer context loses its beginning, with a warning. 0 means the training length.

    Raises:
        UserError: if a continuation is empty or too long, or the mesh does not divide the rows.
    """
    return score_tokens(pretrained, [_tokenize(pretrained, *pair) for pair in pairs], rows, length)


def score_tokens(pretrained: Pretrained, requests: Sequence[Request], rows: int = 8, length: int = 0) -> list[Score]:
    """Like `score`, for token ids."""
    if rows % count_shards():
        raise UserError(f"{rows} rows do not divide over the {count_shards()} shards of data x expert")
    room = length or pretrained.config.data.decoder_length
    for request in requests:
        if not 0 < len(request.continuation) <= room:
            raise UserError(f"a continuation must have 1 to {room} tokens, this one has {len(request.continuation)}")
    scores: list[Score] = []
    cut = 0
    for first in range(0, len(requests), rows):
        some = requests[first : first + rows]
        batch, scored, shortened = _batch(pretrained, some, rows, room, length)
        cut += shortened
        log_probs, greedy = jax.device_get(one_at_a_time(_score_batch(pretrained.model, batch, scored)))
        scores += [
            Score(float(log_prob), len(request.continuation), bool(is_greedy))
            for request, log_prob, is_greedy in zip(some, log_probs, greedy, strict=False)
        ]
    if cut:
        _log.warning("cut the beginning of %d of %d contexts, which are longer than a row", cut, len(requests))
    return scores


@jax.jit
def _score_batch(
    model: TextModel, batch: Batch, scored: Bool[Array, "B L"]
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    logits, _ = model(batch, None)
    log_probs, _ = target_log_probs(logits, batch["decoder_targets"])
    greedy = jnp.argmax(logits, axis=-1) == batch["decoder_targets"]
    return jnp.sum(log_probs, axis=1, where=scored), jnp.all(greedy, axis=1, where=scored)


def _tokenize(pretrained: Pretrained, context: str, continuation: str) -> Request:
    """Converts a pair to token ids; a decoder's pair is tokenised as one text and then divided."""
    encode = pretrained.vocabulary.encode
    if pretrained.config.model.family == "encoder_decoder":
        return Request([*encode(context), EOS], encode(continuation))
    before = encode(context)
    return Request(before, encode(context + continuation)[len(before) :])


def _batch(
    pretrained: Pretrained, requests: Sequence[Request], rows: int, room: int, length: int
) -> tuple[Batch, Bool[Array, "B L"], int]:
    """The model's batch, a mask of the targets to score, and the number of contexts that were cut."""
    batch: Batch = {}
    if pretrained.config.model.family == "encoder_decoder":
        encoder_room = length or pretrained.config.data.encoder_length
        contexts = [request.context[-encoder_room:] for request in requests]
        batch["encoder_tokens"], batch["encoder_segments"] = pad_rows(contexts, encoder_room, rows)
        targets = [request.continuation for request in requests]
        kept = [0] * len(requests)
    else:
        contexts = [
            request.context[max(0, len(request.context) + len(request.continuation) - room) :] for request in requests
        ]
        targets = [[*context, *request.continuation] for context, request in zip(contexts, requests, strict=True)]
        kept = [len(context) for context in contexts]
    batch["decoder_targets"], batch["decoder_segments"] = pad_rows(targets, room, rows)
    batch["decoder_inputs"], _ = pad_rows([[PAD, *row[:-1]] for row in targets], room, rows)
    scored = np.array(batch["decoder_segments"] > 0)
    for row, context_tokens in enumerate(kept):
        scored[row, :context_tokens] = False
    shortened = sum(len(c) < len(request.context) for c, request in zip(contexts, requests, strict=True))
    return batch, jnp.asarray(scored), shortened


def perplexity(pretrained: Pretrained, texts: Sequence[str], rows: int = 8, length: int = 0) -> dict[str, float]:
    """The `neg_log_perplexity` (mean log-likelihood per token, nats), `bits_per_byte` and `target_tokens` of texts.

    Raises:
        UserError: as in `log_likelihoods`.
    """
    scores = log_likelihoods(pretrained, texts, rows, length)
    total, tokens = sum(s.log_prob for s in scores), sum(s.num_tokens for s in scores)
    size = sum(len(text.encode()) for text in texts)
    return {
        "neg_log_perplexity": total / max(tokens, 1),
        "bits_per_byte": -total / math.log(2) / max(size, 1),
        "target_tokens": float(tokens),
    }


def log_likelihoods(pretrained: Pretrained, texts: Sequence[str], rows: int = 8, length: int = 0) -> list[Score]:
    """Scores each text without context, every token once; longer texts are cut into rows, as in training.

    Raises:
        UserError: for an encoder-decoder, which only scores pairs, or if the mesh does not divide the rows.
    """
    if pretrained.config.model.family == "encoder_decoder":
        raise UserError("an encoder-decoder cannot score a text without context: score pairs of context and text")
    room = length or pretrained.config.data.decoder_length
    requests, owners = [], []
    for owner, text in enumerate(texts):
        ids = pretrained.vocabulary.encode(text)
        windows = [Request([], ids[first : first + room]) for first in range(0, len(ids), room)]
        requests += windows
        owners += [owner] * len(windows)
    totals = [Score(0.0, 0, True) for _ in texts]
    for owner, part in zip(owners, score_tokens(pretrained, requests, rows, length), strict=True):
        whole = totals[owner]
        totals[owner] = Score(
            whole.log_prob + part.log_prob, whole.num_tokens + part.num_tokens, whole.is_greedy and part.is_greedy
        )
    return totals


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: the context, the choices, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def solved(self) -> str:
        """The context with its answer, used as an example before other questions."""
        return self.context + self.choices[self.answer]


def few_shot(
    questions: Sequence[Question], pool: Sequence[Question], num_shots: int, seed: int = 0, separator: str = "\n\n"
) -> list[Question]:
    """Puts `num_shots` solved questions before each question, drawn from `pool` without replacement.

    A question is never its own example. Its draws depend only on its position and the seed.

    Raises:
        UserError: if the pool is too small.
    """
    prompted = []
    for place, question in enumerate(questions):
        others = [other for other in pool if other != question]
        if len(others) < num_shots:
            raise UserError(f"cannot draw {num_shots} shots from a pool of {len(others)} other questions")
        drawn = np.random.default_rng((seed, place)).choice(len(others), num_shots, replace=False)
        shots = [others[index].solved for index in drawn]
        prompted.append(replace(question, context=separator.join([*shots, question.context])))
    return prompted


def multiple_choice(
    pretrained: Pretrained, questions: Sequence[Question], rows: int = 8, length: int = 0
) -> dict[str, float]:
    """Answers each question with its most probable choice.

    Returns:
        `accuracy`, the fraction of right answers; `accuracy_per_byte`, the same if log-probabilities are divided by the
        choices' bytes, so that long choices are not at a disadvantage; `questions`, their number.

    Raises:
        UserError: as in `score`.
    """
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    scores = iter(score(pretrained, pairs, rows, length))
    hits = np.zeros(2)
    for question in questions:
        log_probs = np.array([next(scores).log_prob for _ in question.choices])
        sizes = np.array([len(choice.encode()) for choice in question.choices])
        hits += [log_probs.argmax() == question.answer, (log_probs / sizes).argmax() == question.answer]
    accuracy, per_byte = hits / max(len(questions), 1)
    return {"accuracy": float(accuracy), "accuracy_per_byte": float(per_byte), "questions": float(len(questions))}
