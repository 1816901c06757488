"""T5's span corruption (Raffel et al. 2020, section 3.1.4) in numpy."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer

from switchjax.config import UserError
from switchjax.data.vocabulary import EOS

Tokens = Integer[np.ndarray, "..."]
"""Ids of a text, or, as lengths and positions, numbers of them."""

MIN_TOKENS = 2
"""Fewer cannot be corrupted: one token is noise and one is kept."""


@dataclass(frozen=True)
class SpanCorruption:
    """Replaces random spans by sentinels; the targets are the spans, each after its sentinel.

    `Thank you for inviting me to your party` may become
    inputs `Thank you <extra_id_0> me to your <extra_id_1> EOS` and
    targets `<extra_id_0> for inviting <extra_id_1> party EOS`.
    As in T5, the first span never begins the text and the last one ends it.

    Attributes:
        noise_density: fraction of the tokens that are replaced.
        mean_span_length: of the replaced spans.
        first_sentinel: id of `<extra_id_0>`; the next ones count down from it.
    """

    noise_density: float
    mean_span_length: float
    first_sentinel: int

    def num_noise(self, num_tokens: Tokens) -> tuple[Tokens, Tokens]:
        """Numbers of (noise tokens, spans) for chunks of each length; T5's `random_spans_noise_mask`."""
        num_tokens = np.asarray(num_tokens)
        noise = np.clip(np.round(num_tokens * self.noise_density).astype(int), 1, num_tokens - 1)
        spans = np.maximum(np.round(noise / self.mean_span_length).astype(int), 1)
        return np.asarray(noise), np.asarray(np.minimum(spans, num_tokens - noise))

    def lengths(self, num_tokens: Tokens) -> tuple[Tokens, Tokens]:
        """Lengths of (inputs, targets) with their sentinels and EOS; T5's `random_spans_helper`."""
        noise, spans = self.num_noise(num_tokens)
        return np.asarray(num_tokens - noise + spans + 1), np.asarray(noise + spans + 1)

    def max_tokens(self, inputs_length: int, targets_length: int) -> int:
        """The longest chunk that fits: 568 tokens for T5's 512 inputs and 114 targets.

        Raises:
            UserError: if not even the shortest chunk fits.
        """
        candidates = np.arange(MIN_TOKENS, inputs_length + targets_length)
        inputs, targets = self.lengths(candidates)
        fitting = candidates[(inputs <= inputs_length) & (targets <= targets_length)]
        if not len(fitting):
            raise UserError(
                f"data.encoder_length={inputs_length} and data.decoder_length={targets_length} are too short "
                f"for a corrupted text: at least {inputs[0]} and {targets[0]}"
            )
        return int(fitting[-1])

    def corrupt(self, tokens: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """(inputs, targets) of one chunk, EOS included.

        Args:
            tokens: at least `MIN_TOKENS` of them.
            rng: draws the spans.
        """
        noise, spans = (int(number) for number in self.num_noise(np.array(len(tokens))))
        noise_lengths = _random_segments(noise, spans, rng)
        kept_lengths = _random_segments(len(tokens) - noise, spans, rng)
        ends = np.cumsum(noise_lengths + kept_lengths)
        sentinels = self.first_sentinel - np.arange(spans)

        is_noise = _intervals(ends - noise_lengths, ends, len(tokens))
        inputs = _with_sentinels(tokens[~is_noise], np.cumsum(kept_lengths), sentinels)
        targets = _with_sentinels(tokens[is_noise], np.cumsum(noise_lengths) - noise_lengths, sentinels)
        return inputs, targets


def _random_segments(num_items: int, num_segments: int, rng: np.random.Generator) -> Tokens:
    """Lengths of a uniformly random division of items into that many segments, none empty."""
    cuts = rng.choice(num_items - 1, num_segments - 1, replace=False, shuffle=False) + 1
    cuts.sort()
    return np.diff(cuts, prepend=0, append=num_items)


def _intervals(starts: Tokens, ends: Tokens, length: int) -> Bool[np.ndarray, "_"]:
    """True in every [start, end)."""
    change = np.zeros(length + 1, np.int8)
    change[starts] += 1
    change[ends] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).astype(bool)


def _with_sentinels(tokens: Tokens, before: Tokens, sentinels: Tokens) -> Tokens:
    """Puts each sentinel before the token at its position, and EOS at the end."""
    result = np.empty(len(tokens) + len(sentinels) + 1, np.int32)
    positions = before + np.arange(len(sentinels))
    is_token = np.ones(len(result), bool)
    is_token[positions] = False
    is_token[-1] = False
    result[positions] = sentinels
    result[is_token] = tokens
    result[-1] = EOS
    return result


def restore(inputs: Tokens, targets: Tokens, lowest_sentinel: int) -> Tokens:
    """The tokens that were corrupted: `corrupt` inverted.

    Args:
        inputs: as `corrupt` returns them.
        targets: the same.
        lowest_sentinel: ids from here on are sentinels.

    Raises:
        ValueError: if a sentinel of the inputs is not answered in the targets.
    """
    positions = np.flatnonzero(targets[:-1] >= lowest_sentinel)
    spans = dict(zip(targets[positions].tolist(), np.split(targets[:-1], positions)[1:], strict=True))
    restored: list[np.ndarray] = []
    for token in inputs[:-1]:
        if token < lowest_sentinel:
            restored.append(np.array([token]))
        elif int(token) in spans:
            restored.append(spans.pop(int(token))[1:])
        else:
            raise ValueError(f"the targets do not answer sentinel {token}")
    return np.concatenate(restored)
