"""Rows of batches: the chunks in each, its arrays, and the process that computes it."""

from collections.abc import Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Integer

from switchjax.data.objective import TokenIds
from switchjax.data.packing import Chunks, RowPlan
from switchjax.data.vocabulary import EOS, PAD

HostBatch = dict[str, Integer[np.ndarray, "B ..."]]
"""A batch of numpy arrays, before it is laid over the devices.

Text, all int32: `encoder_tokens`, `encoder_segments` [B, encoder_length] for encoder-decoders only; `decoder_inputs`,
`decoder_targets` and `decoder_segments` [B, decoder_length]. A row's segments are numbered 1, 2, ...; 0 is padding.
Images: `images` uint8 [B, H, W, C]; `labels` int32 [B], where -1 is padding."""
Row = dict[str, Integer[np.ndarray, "..."]]
"""One row of a `HostBatch`: the same arrays without B."""


def fill_row(examples: Sequence[Mapping[str, TokenIds]], row_lengths: Mapping[str, int]) -> Row:
    """Makes the arrays of one row of text, [L] each.

    Decoder inputs are the targets shifted right by one within their segment. As in T5, each begins with pad.

    Args:
        examples: one per segment: by stack, the tokens that it reads (encoder) or predicts (decoder).
        row_lengths: L of each stack.
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
            # The first input of a segment is pad: np.roll moves the previous segment's last token there.
            same_segment = np.diff(segments, prepend=0) == 0
            inputs = np.where(same_segment, np.roll(tokens, 1), np.int32(PAD))
            row |= {"decoder_inputs": inputs, "decoder_targets": tokens, "decoder_segments": segments}
    return row


def _padded(values: Integer[np.ndarray, "_"], length: int) -> Integer[np.ndarray, "L"]:
    result = np.full(length, PAD, np.int32)
    result[: len(values)] = values
    return result


class RowSource:
    """Random access to the chunks of each row, as grain needs it."""

    def __init__(self, tokens: TokenIds, chunks: Chunks, rows: RowPlan) -> None:
        self._tokens, self._chunks, self._rows = tokens, chunks, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[TokenIds]:
        first, last = self._rows.offsets[index : index + 2]
        return [self._chunk(chunk) for chunk in self._rows.chunks[first:last].tolist()]

    def _chunk(self, chunk: int) -> TokenIds:
        start, with_eos = self._chunks.starts[chunk], self._chunks.with_eos[chunk]
        tokens = self._tokens[start : start + self._chunks.lengths[chunk] - with_eos]
        return np.append(tokens, tokens.dtype.type(EOS)) if with_eos else tokens


class ProcessRows:
    """The sequence of rows that one process computes, batch after batch."""

    def __init__(self, rows: grain.MapDataset, batch_size: int, own: Sequence[int] | None) -> None:
        """`own` is as in `Data.train_batches`."""
        self.rows = rows
        self._batch_size, self._own = batch_size, range(batch_size) if own is None else own
        self.num_rows = len(self._own)

    def __len__(self) -> int:
        return 2**40 * self.num_rows  # endless in practice, yet small enough for grain's 64-bit arithmetic

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.global_index(index)]

    def global_index(self, index: int) -> int:
        """The position of this process's row `index` in the sequence of all processes' rows."""
        batch, row = divmod(index, self.num_rows)
        return batch * self._batch_size + int(self._own[row])
