"""Rows of batches: their chunks, their arrays, and which process computes them."""

from collections.abc import Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Integer

from switchjax.data.objective import Tokens
from switchjax.data.packing import Chunks, Rows
from switchjax.data.vocabulary import EOS, PAD

HostBatch = dict[str, Integer[np.ndarray, "B ..."]]
"""Text: `encoder_tokens`, `encoder_segments`: [B, encoder_length], of encoder-decoders only; `decoder_inputs`,
`decoder_targets`, `decoder_segments`: [B, decoder_length]. All int32. Segments of a row are numbered 1, 2, ...; 0 is
padding. Images: `images`: uint8 [B, H, W, C], `labels`: int32 [B], where -1 is padding."""
Row = dict[str, Integer[np.ndarray, "..."]]
"""The same without B."""


def fill_row(examples: Sequence[Mapping[str, Tokens]], row_lengths: Mapping[str, int]) -> Row:
    """The arrays of one row of text, [L] each.

    Decoder inputs are the targets shifted right within their segment, beginning with pad as T5's do.

    Args:
        examples: each a segment: stack -> the tokens that it reads (encoder) or predicts (decoder).
        row_lengths: stack -> L.
    """
    row: Row = {}
    for stack, length in row_lengths.items():
        texts = [example[stack] for example in examples]
        lengths = [len(text) for text in texts]
        tokens = _padded(np.concatenate([np.zeros(0, np.int32), *texts]), length)
        segments = _padded(np.repeat(np.arange(1, len(texts) + 1), lengths), length)
        if stack == "encoder":
            row |= {"encoder_tokens": tokens, "encoder_segments": segments}
        else:
            same_segment = np.diff(segments, prepend=0) == 0
            inputs = np.where(same_segment, np.roll(tokens, 1), np.int32(PAD))
            row |= {"decoder_inputs": inputs, "decoder_targets": tokens, "decoder_segments": segments}
    return row


def _padded(values: Integer[np.ndarray, "_"], length: int) -> Integer[np.ndarray, "L"]:
    result = np.full(length, PAD, np.int32)
    result[: len(values)] = values
    return result


class RowSource:
    """Random access to the chunks of each row, for grain."""

    def __init__(self, tokens: Tokens, chunks: Chunks, rows: Rows) -> None:
        self._tokens, self._chunks, self._rows = tokens, chunks, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Tokens]:
        first, last = self._rows.offsets[index : index + 2]
        return [self._chunk(chunk) for chunk in self._rows.chunks[first:last]]

    def _chunk(self, chunk: int) -> Tokens:
        start, with_eos = self._chunks.starts[chunk], self._chunks.with_eos[chunk]
        tokens = self._tokens[start : start + self._chunks.lengths[chunk] - with_eos]
        return np.append(tokens, tokens.dtype.type(EOS)) if with_eos else tokens


class ProcessRows:
    """The rows of global batches that belong to one process, one after the other."""

    def __init__(self, rows: grain.MapDataset, batch_size: int, own: Sequence[int] | None) -> None:
        """See `Data.train_batches` for `own`."""
        self.rows = rows
        self._batch_size, self._own = batch_size, range(batch_size) if own is None else own
        self.num_rows = len(self._own)

    def __len__(self) -> int:
        return 2**40 * self.num_rows  # Endless in practice, and far from where lengths overflow.

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.global_index(index)]

    def global_index(self, index: int) -> int:
        """Where this process' row `index` stands in the sequence of all rows."""
        batch, row = divmod(index, self.num_rows)
        return batch * self._batch_size + int(self._own[row])
