"""T5's span corruption (Raffel et al. 2020, section 3.1.4) in numpy."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Integer

from switchjax.config import DataConfig, UserError
from switchjax.data.objective import Objective, TokenIds
from switchjax.data.vocabulary import EOS, Vocabulary

Lengths = Integer[np.ndarray, "chunks"]


@dataclass(frozen=True)
class SpanCorruption(Objective):
    """Replaces random spans by sentinels; the targets are the replaced spans, each after its sentinel.

    `Thank you for inviting me to your party` may become
    inputs `Thank you <extra_id_0> me to your <extra_id_1> EOS` and
    targets `<extra_id_0> for inviting <extra_id_1> party EOS`.
    As in T5, a chunk always begins with kept tokens and ends with a replaced span.

    Attributes:
        noise_density: fraction of the tokens that are replaced.
        mean_span_length: mean length of the replaced spans, in tokens.
        first_sentinel: id of `<extra_id_0>`; the ids of the following sentinels count down from it.
        encoder_length: tokens in a row of inputs.
        decoder_length: tokens in a row of targets.
    """

    # One token to replace and one to keep.
    min_tokens: ClassVar[int] = 2
    # Not needed: `example` ends the inputs and the targets of every chunk with EOS.
    ends_documents: ClassVar[bool] = False

    noise_density: float
    mean_span_length: float
    first_sentinel: int
    encoder_length: int
    decoder_length: int

    @classmethod
    def from_config(cls, config: DataConfig, vocabulary: Vocabulary) -> "SpanCorruption":
        """See `Objective`.

        Raises:
            UserError: if no chunk fits the row lengths, or the longest chunk has more spans than there are sentinels.
        """
        lengths = config.encoder_length, config.decoder_length
        corruption = cls(config.noise_density, config.mean_span_length, vocabulary.size - 1, *lengths)
        longest = corruption.max_tokens
        _, spans = corruption.num_noise(np.array([longest]))
        if spans.item() > vocabulary.num_sentinels:
            raise UserError(
                f"data.num_sentinels={vocabulary.num_sentinels} is too few: "
                f"a chunk of {longest} tokens has {spans.item()} spans"
            )
        return corruption

    @property
    def row_lengths(self) -> dict[str, int]:
        """Row lengths of inputs and targets."""
        return {"encoder": self.encoder_length, "decoder": self.decoder_length}

    def num_noise(self, num_tokens: Lengths) -> tuple[Lengths, Lengths]:
        """The numbers of noise tokens and of spans in chunks of these lengths, as in T5's `random_spans_noise_mask`."""
        # np.round and the order of the bounds are T5's: other rounding gives other lengths than the published models'.
        noise = np.clip(np.round(num_tokens * self.noise_density).astype(int), 1, num_tokens - 1)
        spans = np.maximum(np.round(noise / self.mean_span_length).astype(int), 1)
        return noise, np.minimum(spans, num_tokens - noise)

    def lengths(self, num_tokens: Lengths) -> Integer[np.ndarray, "2 chunks"]:
        """Lengths of inputs and targets with their sentinels and EOS, as in T5's `random_spans_helper`.

        For T5's 512 inputs and 114 targets, the longest chunk has 568 tokens.
        """
        noise, spans = self.num_noise(num_tokens)
        # Each side holds its own tokens, one sentinel per span and one EOS.
        return np.stack([num_tokens - noise + spans + 1, noise + spans + 1])

    def example(self, tokens: TokenIds, rng: np.random.Generator) -> dict[str, TokenIds]:
        """The inputs with random spans replaced, and their targets; both end with EOS."""
        noise, spans = (int(number.item()) for number in self.num_noise(np.array([len(tokens)])))
        noise_lengths = _random_segments(noise, spans, rng)
        kept_lengths = _random_segments(len(tokens) - noise, spans, rng)
        # Kept and replaced segments alternate, a kept one first: each pair ends with a replaced span.
        ends = np.cumsum(noise_lengths + kept_lengths)
        sentinels = self.first_sentinel - np.arange(spans)

        is_noise = _intervals(ends - noise_lengths, ends, len(tokens))
        return {
            "encoder": _with_sentinels(tokens[~is_noise], np.cumsum(kept_lengths), sentinels),
            "decoder": _with_sentinels(tokens[is_noise], np.cumsum(noise_lengths) - noise_lengths, sentinels),
        }


def _random_segments(num_items: int, num_segments: int, rng: np.random.Generator) -> Lengths:
    """Divides items into that many non-empty segments, uniformly at random; returns the segments' lengths."""
    # Distinct cuts between items, so that no segment is empty.
    cuts = rng.choice(num_items - 1, num_segments - 1, replace=False, shuffle=False) + 1
    cuts.sort()
    return np.diff(cuts, prepend=0, append=num_items)


def _intervals(starts: Lengths, ends: Lengths, length: int) -> Bool[np.ndarray, "_"]:
    """A mask of `length` items that is True inside the disjoint intervals [start, end)."""
    # A running sum of +1 at starts and -1 at ends is 1 inside an interval and 0 outside, without a Python loop.
    change = np.zeros(length + 1, np.int8)
    change[starts] += 1
    change[ends] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).astype(bool)


def _with_sentinels(tokens: TokenIds, before: Lengths, sentinels: TokenIds) -> TokenIds:
    """Inserts sentinel i before `tokens[before[i]]` and appends EOS."""
    result = np.empty(len(tokens) + len(sentinels) + 1, np.int32)
    # The i sentinels inserted earlier move sentinel i to the right by i.
    positions = before + np.arange(len(sentinels))
    is_token = np.ones(len(result), bool)
    is_token[positions] = False
    is_token[-1] = False
    result[positions] = sentinels
    result[is_token] = tokens
    result[-1] = EOS
    return result
