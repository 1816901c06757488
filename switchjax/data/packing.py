"""From documents to chunks to rows: which tokens share a row of a batch.

What a chunk occupies of a row follows from its number of tokens alone, so rows are planned once, from
lengths, before any token is read. Rows can then be read in any order, which makes shuffling, resuming
and the split over processes exact, and a process computes its own rows only. Grain's packing does not
fit: it packs a stream as it comes, so row n is known only after the rows before it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer

from switchjax.data.objective import Objective


@dataclass(frozen=True)
class Chunks:
    """Stretches of documents, none across a document's end; together they hold every usable token once.

    Attributes:
        starts: where each chunk begins in the flat token array.
        lengths: in tokens, an EOS included.
        with_eos: whether the chunk's last token is an EOS, which the flat array lacks.
        dropped: number of chunks that were too short for the objective.
        dropped_tokens: tokens in those.
    """

    starts: Integer[np.ndarray, "chunks"]
    lengths: Integer[np.ndarray, "chunks"]
    with_eos: Bool[np.ndarray, "chunks"]
    dropped: int
    dropped_tokens: int


@dataclass(frozen=True)
class Rows:
    """Row r holds the chunks `chunks[offsets[r]:offsets[r + 1]]`, each a segment."""

    chunks: Integer[np.ndarray, "chunks"]
    offsets: Integer[np.ndarray, "rows_plus_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def split_into_chunks(offsets: Integer[np.ndarray, "documents_plus_1"], objective: Objective) -> Chunks:
    """Cuts documents into the longest chunks that fit, the last chunk of each being what remains.

    Args:
        offsets: document d is `tokens[offsets[d]:offsets[d + 1]]`.
        objective: tells how long chunks may be, and whether a document ends with an EOS.
    """
    # An EOS alone would teach nothing, so an empty document stays empty.
    ends = offsets[1:] + objective.ends_documents * (np.diff(offsets) > 0)
    max_tokens = objective.max_tokens
    counts = -(-(ends - offsets[:-1]) // max_tokens)
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(offsets[:-1], counts) + position * max_tokens
    lengths = np.minimum(np.repeat(ends, counts) - starts, max_tokens)
    with_eos = starts + lengths > np.repeat(offsets[1:], counts)
    usable = lengths >= objective.min_tokens
    dropped = lengths[~usable]
    return Chunks(starts[usable], lengths[usable], with_eos[usable], len(dropped), int(dropped.sum()))


def one_chunk_a_row(num_chunks: int) -> Rows:
    """Every chunk in a row of its own, to be padded."""
    return Rows(np.arange(num_chunks), np.arange(num_chunks + 1))


def pack(lengths: Integer[np.ndarray, "chunks"], objective: Objective, rng: np.random.Generator) -> Rows:
    """Fills rows with chunks, the longest that still fits first (first-fit decreasing).

    As in histogram packing (Krell et al. 2021, "Efficient sequence packing without
    cross-contamination"), the work is in the number of different lengths and not in that of chunks:
    a composition of lengths is found once and repeated for as long as there are chunks for it.

    Args:
        lengths: tokens of each chunk.
        objective: tells what a chunk occupies of a row, and what a row has room for.
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
    while (composition := _composition(left, objective))[0].size:
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
    left: Integer[np.ndarray, "lengths"], objective: Objective
) -> tuple[Integer[np.ndarray, "kinds"], Integer[np.ndarray, "kinds"]]:
    """Chunk lengths that fill a row, and how often each is used in it."""
    kinds, uses = [], []
    available = np.flatnonzero(left)
    needed = objective.lengths(available)
    room = np.array(list(objective.row_lengths.values()))
    while len(available):
        times = np.minimum(left[available], (room[:, None] // needed).min(0))
        fitting = np.flatnonzero(times)
        if not len(fitting):
            break
        best = fitting[-1]
        kinds.append(available[best])
        uses.append(times[best])
        room = room - needed[:, best] * times[best]
        available, needed = available[:best], needed[:, :best]
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
