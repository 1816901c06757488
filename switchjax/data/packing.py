"""From documents to chunks to rows: which tokens share a row of a batch.

The lengths of a corrupted chunk follow from its number of tokens alone, so rows are planned once, from
lengths, before any token is read. Rows can then be read in any order, which makes shuffling, resuming
and the split over processes exact, and a process computes its own rows only.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from switchjax.data.span_corruption import MIN_TOKENS, SpanCorruption


@dataclass(frozen=True)
class Chunks:
    """Stretches of documents, none across a document's end; together they hold every usable token once.

    Attributes:
        starts: where each chunk begins in the flat token array.
        lengths: in tokens.
        dropped: number of chunks that were too short to corrupt.
        dropped_tokens: tokens in those.
    """

    starts: Integer[np.ndarray, "chunks"]
    lengths: Integer[np.ndarray, "chunks"]
    dropped: int
    dropped_tokens: int


@dataclass(frozen=True)
class Rows:
    """Row r holds the chunks `chunks[offsets[r]:offsets[r + 1]]`, each a segment."""

    chunks: Integer[np.ndarray, "chunks"]
    offsets: Integer[np.ndarray, "rows_plus_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def split_into_chunks(offsets: Integer[np.ndarray, "documents_plus_1"], max_tokens: int) -> Chunks:
    """Cuts documents into chunks of `max_tokens`, the last chunk of each being what remains.

    Args:
        offsets: document d is `tokens[offsets[d]:offsets[d + 1]]`.
        max_tokens: length of the longest chunk.
    """
    document_lengths = np.diff(offsets)
    counts = -(-document_lengths // max_tokens)
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(offsets[:-1], counts) + position * max_tokens
    lengths = np.minimum(np.repeat(offsets[1:], counts) - starts, max_tokens)
    usable = lengths >= MIN_TOKENS
    return Chunks(starts[usable], lengths[usable], int((~usable).sum()), int(lengths[~usable].sum()))


def one_chunk_a_row(num_chunks: int) -> Rows:
    """Every chunk in a row of its own, to be padded."""
    return Rows(np.arange(num_chunks), np.arange(num_chunks + 1))


def pack(
    lengths: Integer[np.ndarray, "chunks"],
    corruption: SpanCorruption,
    encoder_length: int,
    decoder_length: int,
    rng: np.random.Generator,
) -> Rows:
    """Fills rows with chunks, the longest that still fits first (first-fit decreasing).

    As in histogram packing (Krell et al. 2021, "Efficient sequence packing without
    cross-contamination"), the work is in the number of different lengths and not in that of chunks:
    a composition of lengths is found once and repeated for as long as there are chunks for it.

    Args:
        lengths: tokens of each chunk, before corruption.
        corruption: tells how long inputs and targets become.
        encoder_length: room for the inputs of a row.
        decoder_length: room for its targets.
        rng: deals chunks of equal length to rows, and orders the rows.

    Returns:
        Rows that hold each chunk once.
    """
    chunks = rng.permutation(len(lengths))
    chunks = chunks[np.argsort(lengths[chunks], kind="stable")]
    counts = np.bincount(lengths, minlength=1)
    ends = np.cumsum(counts)
    left = counts.copy()
    pieces, row_lengths = [], []
    while (composition := _composition(left, corruption, encoder_length, decoder_length))[0].size:
        kinds, uses = composition
        repeats = int((left[kinds] // uses).min())
        taken = [
            chunks[ends[kind] - left[kind] :][: repeats * use].reshape(repeats, use)
            for kind, use in zip(kinds, uses, strict=True)
        ]
        left[kinds] -= repeats * uses
        pieces.append(np.concatenate(taken, axis=1))
        row_lengths.append(np.full(repeats, uses.sum()))
    return _shuffled(pieces, row_lengths, rng)


def _composition(
    left: Integer[np.ndarray, "lengths"], corruption: SpanCorruption, encoder_room: int, decoder_room: int
) -> tuple[Integer[np.ndarray, "kinds"], Integer[np.ndarray, "kinds"]]:
    """Chunk lengths that fill a row, and how often each is used in it."""
    kinds, uses = [], []
    available = np.flatnonzero(left)
    inputs, targets = corruption.lengths(available)
    while len(available):
        times = np.minimum(left[available], np.minimum(encoder_room // inputs, decoder_room // targets))
        fitting = np.flatnonzero(times)
        if not len(fitting):
            break
        best = fitting[-1]
        kinds.append(available[best])
        uses.append(times[best])
        encoder_room -= inputs[best] * times[best]
        decoder_room -= targets[best] * times[best]
        available, inputs, targets = available[:best], inputs[:best], targets[:best]
    return np.array(kinds, int), np.array(uses, int)


def _shuffled(pieces: list[np.ndarray], row_lengths: list[np.ndarray], rng: np.random.Generator) -> Rows:
    """The rows of all compositions in random order."""
    chunks = np.concatenate([np.zeros(0, int), *(piece.ravel() for piece in pieces)])
    lengths = np.concatenate([np.zeros(0, int), *row_lengths])
    starts = np.cumsum(lengths) - lengths
    order = rng.permutation(len(lengths))
    offsets = np.cumsum(np.concatenate([[0], lengths[order]]))
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths[order])
    return Rows(chunks[np.repeat(starts[order], lengths[order]) + within], offsets)
