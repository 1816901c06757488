import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from switchjax.data.causal import Causal
from switchjax.data.objective import Objective
from switchjax.data.packing import one_chunk_per_row, pack, split_into_chunks
from switchjax.data.span_corruption import SpanCorruption

T5 = SpanCorruption(0.15, 3.0, 999, 512, 114)
GPT = Causal(128)
objectives = pytest.mark.parametrize("objective", [T5, GPT])
settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=60)


@settings
@hypothesis.given(st.lists(st.integers(0, 400), max_size=40), st.integers(8, 120))
def test_corrupted_chunks_hold_every_token_once(document_lengths: list[int], length: int) -> None:
    offsets = np.cumsum([0, *document_lengths])
    objective = SpanCorruption(0.15, 3.0, 999, length, length)
    chunks = split_into_chunks(offsets, objective)
    assert not chunks.with_eos.any()
    used = np.zeros(offsets[-1], int)
    for start, length in zip(chunks.starts, chunks.lengths, strict=True):
        used[start : start + length] += 1
        assert 2 <= length <= objective.max_tokens
        document = np.searchsorted(offsets, start, side="right") - 1
        assert start + length <= offsets[document + 1]
    assert used.max(initial=0) <= 1
    assert (used == 0).sum() == chunks.dropped_tokens == chunks.dropped  # A dropped chunk is one token.


@settings
@hypothesis.given(st.lists(st.integers(0, 400), max_size=40), st.integers(1, 120))
def test_causal_chunks_are_the_documents_each_with_an_eos(document_lengths: list[int], length: int) -> None:
    offsets = np.cumsum([0, *document_lengths])
    chunks = split_into_chunks(offsets, Causal(length))
    assert chunks.dropped == chunks.dropped_tokens == 0
    assert (chunks.lengths > 0).all()
    assert (chunks.lengths <= length).all()
    ends = chunks.starts + chunks.lengths - chunks.with_eos
    assert ends[chunks.with_eos].tolist() == [end for end, n in zip(offsets[1:], document_lengths, strict=True) if n]
    tokens = [token for start, end in zip(chunks.starts, ends, strict=True) for token in range(start, end)]
    assert tokens == list(range(offsets[-1]))


@objectives
@settings
@hypothesis.given(st.lists(st.floats(0, 1), max_size=80), st.integers(0, 2**32 - 1))
def test_rows_hold_every_chunk_once_and_never_overflow(objective: Objective, fractions: list[float], seed: int) -> None:
    shortest, longest = objective.min_tokens, objective.max_tokens
    chunks = np.array([round(shortest + fraction * (longest - shortest)) for fraction in fractions], int)
    rows = pack(chunks, objective, np.random.default_rng(seed))
    assert sorted(rows.chunks) == list(range(len(chunks)))
    needed, room = objective.lengths(chunks), np.array(list(objective.row_lengths.values()))
    for row in range(len(rows)):
        members = rows.chunks[rows.offsets[row] : rows.offsets[row + 1]]
        assert len(members)
        assert (needed[:, members].sum(1) <= room).all()


@objectives
def test_packing_fills_rows(objective: Objective) -> None:
    lengths = np.random.default_rng(0).integers(2, objective.max_tokens // 2, 5000)
    rows = pack(lengths, objective, np.random.default_rng(0))
    assert objective.lengths(lengths)[0].sum() / (next(iter(objective.row_lengths.values())) * len(rows)) > 0.95


def test_packing_is_a_function_of_the_generator() -> None:
    lengths = np.random.default_rng(0).integers(2, 300, 200)
    first, second, other = (pack(lengths, T5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.chunks, second.chunks)
    assert not np.array_equal(first.chunks, other.chunks)


def test_unpacked_rows_hold_one_chunk_each() -> None:
    rows = one_chunk_per_row(3)
    assert len(rows) == 3
    assert np.diff(rows.offsets).tolist() == [1, 1, 1]
