import hypothesis
import numpy as np
from hypothesis import strategies as st

from switchjax.data.packing import one_chunk_a_row, pack, split_into_chunks
from switchjax.data.span_corruption import SpanCorruption

T5 = SpanCorruption(0.15, 3.0, 999)
settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=60)


@settings
@hypothesis.given(st.lists(st.integers(0, 400), max_size=40), st.integers(2, 120))
def test_chunks_hold_every_token_once(document_lengths: list[int], max_tokens: int) -> None:
    offsets = np.cumsum([0, *document_lengths])
    chunks = split_into_chunks(offsets, max_tokens)
    used = np.zeros(offsets[-1], int)
    for start, length in zip(chunks.starts, chunks.lengths, strict=True):
        used[start : start + length] += 1
        assert 2 <= length <= max_tokens
        document = np.searchsorted(offsets, start, side="right") - 1
        assert start + length <= offsets[document + 1]
    assert used.max(initial=0) <= 1
    assert (used == 0).sum() == chunks.dropped_tokens == chunks.dropped  # A dropped chunk is one token.


@settings
@hypothesis.given(st.lists(st.integers(2, 568), max_size=80), st.integers(0, 2**32 - 1))
def test_rows_hold_every_chunk_once_and_never_overflow(lengths: list[int], seed: int) -> None:
    chunks = np.array(lengths, int)
    rows = pack(chunks, T5, 512, 114, np.random.default_rng(seed))
    assert sorted(rows.chunks) == list(range(len(chunks)))
    inputs, targets = T5.lengths(chunks)
    for row in range(len(rows)):
        members = rows.chunks[rows.offsets[row] : rows.offsets[row + 1]]
        assert len(members)
        assert inputs[members].sum() <= 512
        assert targets[members].sum() <= 114


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(2, 300, 5000)
    rows = pack(lengths, T5, 512, 114, np.random.default_rng(0))
    assert T5.lengths(lengths)[0].sum() / (512 * len(rows)) > 0.95


def test_packing_is_a_function_of_the_generator() -> None:
    lengths = np.random.default_rng(0).integers(2, 300, 200)
    first, second, other = (pack(lengths, T5, 512, 114, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.chunks, second.chunks)
    assert not np.array_equal(first.chunks, other.chunks)


def test_unpacked_rows_hold_one_chunk_each() -> None:
    rows = one_chunk_a_row(3)
    assert len(rows) == 3
    assert np.diff(rows.offsets).tolist() == [1, 1, 1]
