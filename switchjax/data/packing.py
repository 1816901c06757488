"""Cuts documents into chunks and decides which chunks share a row of a batch.

The space that a chunk takes in a row depends only on its number of tokens, so all rows are planned from lengths before
any token is read. Rows can then be read in any order: shuffling, resuming and the split over processes are exact, and
each process computes only its own rows. Grain's packing does not serve: it packs a stream as
it comes, so a row is known only after the rows before it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer

from switchjax.data.objective import Objective


@dataclass(frozen=True)
class Chunks:
    """Stretches of documents. No chunk crosses a document's end; every usable token is in exactly one chunk.

    Attributes:
        starts: where each chunk begins in the flat token array.
        lengths: in tokens, including an EOS.
        with_eos: whether the chunk's last token is an EOS. The flat array holds no EOS.
        dropped: number of chunks that were too short for the objective.
        dropped_tokens: tokens in the dropped chunks.
    """

    starts: Integer[np.ndarray, "chunks"]
    lengths: Integer[np.ndarray, "chunks"]
    with_eos: Bool[np.ndarray, "chunks"]
    dropped: int
    dropped_tokens: int


@dataclass(frozen=True)
class RowPlan:
    """Row r holds the chunks `chunks[offsets[r]:offsets[r + 1]]`; each chunk is a segment."""

    chunks: Integer[np.ndarray, "chunks"]
    offsets: Integer[np.ndarray, "rows_plus_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def split_into_chunks(offsets: Integer[np.ndarray, "documents_plus_1"], objective: Objective) -> Chunks:
    """Cuts each document into chunks of the greatest length that fits a row; the last chunk holds the remainder.

    Args:
        offsets: document d is `tokens[offsets[d]:offsets[d + 1]]`.
        objective: decides how long chunks may be and whether a document ends with an EOS.
    """
    # An empty document gets no EOS, because a model learns nothing from an EOS alone.
    ends = offsets[1:] + objective.ends_documents * (np.diff(offsets) > 0)
    max_tokens = objective.max_tokens
    counts = -(-(ends - offsets[:-1]) // max_tokens)
    # position: 0, 1, 2, ... within each document; arange counts over all chunks, minus where each document's begin.
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(offsets[:-1], counts) + position * max_tokens
    lengths = np.minimum(np.repeat(ends, counts) - starts, max_tokens)
    with_eos = starts + lengths > np.repeat(offsets[1:], counts)
    usable = lengths >= objective.min_tokens
    dropped = lengths[~usable]
    return Chunks(starts[usable], lengths[usable], with_eos[usable], len(dropped), int(dropped.sum()))


def one_chunk_per_row(num_chunks: int) -> RowPlan:
    """Puts every chunk into a row of its own; padding fills the rest."""
    return RowPlan(np.arange(num_chunks), np.arange(num_chunks + 1))


def pack(lengths: Integer[np.ndarray, "chunks"], objective: Objective, rng: np.random.Generator) -> RowPlan:
    """Fills each row with chunks, always the longest that still fits (first-fit decreasing).

    As in histogram packing (Krell et al. 2021, "Efficient sequence packing without cross-contamination"), the work
    grows with the number of different lengths, not with the number of chunks: a composition of lengths that fills a row
    is found once and repeated while chunks of these lengths remain.

    Args:
        lengths: tokens of each chunk.
        objective: decides how much of a row a chunk takes, and how long rows are.
        rng: assigns chunks of equal length to rows, and orders the rows.

    Returns:
        Rows that hold each chunk once.
    """
    chunks = rng.permutation(len(lengths))
    # The stable sort keeps the random order among chunks of equal length: the chunks of length n, in random order, are
    # chunks[ends[n] - counts[n] : ends[n]], of which the last left[n] are still unused.
    chunks = chunks[np.argsort(lengths[chunks], kind="stable")]
    counts = np.bincount(lengths, minlength=1)
    ends = np.cumsum(counts)
    left = counts.copy()
    pieces, row_lengths = [], []
    while (composition := _composition(left, objective))[0].size:
        kinds, uses = composition
        repeats = int((left[kinds] // uses).min())  # rows of this composition, until one of its lengths runs out
        taken = [
            chunks[ends[kind] - left[kind] :][: repeats * use].reshape(repeats, use)
            for kind, use in zip(kinds, uses, strict=True)
        ]
        left[kinds] -= repeats * uses
        pieces.append(np.concatenate(taken, axis=1))
        row_lengths.append(np.full(repeats, uses.sum()))
    return _shuffled(pieces, row_lengths, rng)


def _composition(
    left: Integer[np.ndarray, "lengths"], objective: Objective
) -> tuple[Integer[np.ndarray, "kinds"], Integer[np.ndarray, "kinds"]]:
    """Fills one row greedily; returns its chunk lengths and how many chunks of each length it holds."""
    kinds, uses = [], []
    available = np.flatnonzero(left)
    needed = objective.lengths(available)
    room = np.array(list(objective.row_lengths.values()))
    while len(available):
        times = np.minimum(left[available], (room[:, None] // needed).min(0))
        fitting = np.flatnonzero(times)
        if not len(fitting):
            break
        best = fitting[-1]  # the longest that fits: `available` ascends
        kinds.append(available[best])
        uses.append(times[best])
        room = room - needed[:, best] * times[best]
        available, needed = available[:best], needed[:, :best]
    return np.array(kinds, int), np.array(uses, int)


def _shuffled(pieces: list[np.ndarray], row_lengths: list[np.ndarray], rng: np.random.Generator) -> RowPlan:
    """Puts all rows into random order, given each composition's `pieces` [rows, chunks per row]."""
    chunks = np.concatenate([np.zeros(0, int), *(piece.ravel() for piece in pieces)])
    lengths = np.concatenate([np.zeros(0, int), *row_lengths])
    starts = np.cumsum(lengths) - lengths
    order = rng.permutation(len(lengths))
    offsets = np.cumsum(np.concatenate([[0], lengths[order]]))
    # A gather of stretches of different lengths without a Python loop: where each begins, plus 0, 1, 2, ... within it.
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths[order])
    return RowPlan(chunks[np.repeat(starts[order], lengths[order]) + within], offsets)
