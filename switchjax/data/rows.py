"""Rows of batches: their chunks, their arrays, and which process computes them."""

import grain
import numpy as np
from jaxtyping import Integer

from switchjax.config import UserError
from switchjax.data.packing import Chunks, Rows
from switchjax.data.vocabulary import PAD

Batch = dict[str, Integer[np.ndarray, "B _"]]
"""`encoder_tokens`, `encoder_segments`: [B, encoder_length]. `decoder_inputs`, `decoder_targets`,
`decoder_segments`: [B, decoder_length]. All int32. Segments of a row are numbered 1, 2, ...; 0 is padding."""
Row = dict[str, Integer[np.ndarray, "_"]]
"""The same without B."""


def fill_row(pairs: list[tuple[np.ndarray, np.ndarray]], encoder_length: int, decoder_length: int) -> Row:
    """The arrays of one row, [L] each, with a segment for each (inputs, targets).

    Decoder inputs are the targets shifted right within their segment, beginning with pad as T5's do.
    """
    row = {name: np.full(encoder_length, PAD, np.int32) for name in ("encoder_tokens", "encoder_segments")}
    for name in ("decoder_inputs", "decoder_targets", "decoder_segments"):
        row[name] = np.full(decoder_length, PAD, np.int32)
    encoder = decoder = 0
    for segment, (inputs, targets) in enumerate(pairs, start=1):
        read, written = slice(encoder, encoder + len(inputs)), slice(decoder, decoder + len(targets))
        row["encoder_tokens"][read] = inputs
        row["encoder_segments"][read] = segment
        row["decoder_targets"][written] = targets
        row["decoder_inputs"][decoder + 1 : written.stop] = targets[:-1]
        row["decoder_segments"][written] = segment
        encoder, decoder = read.stop, written.stop
    return row


class RowSource:
    """Random access to the chunks of each row, for grain."""

    def __init__(self, tokens: np.ndarray, chunks: Chunks, rows: Rows) -> None:
        self._tokens, self._chunks, self._rows = tokens, chunks, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[np.ndarray]:
        first, last = self._rows.offsets[index : index + 2]
        chunks = self._rows.chunks[first:last]
        starts, lengths = self._chunks.starts[chunks], self._chunks.lengths[chunks]
        return [self._tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


class ProcessRows:
    """The rows of global batches that belong to one process, one after the other."""

    def __init__(self, rows: grain.MapDataset, batch_size: int, process_index: int, process_count: int) -> None:
        if batch_size % process_count:
            raise UserError(f"data.batch_size={batch_size} is not a multiple of the {process_count} processes")
        self.rows = rows
        self.num_rows = batch_size // process_count
        self._batch_size, self._process_index = batch_size, process_index

    def __len__(self) -> int:
        return 2**40 * self.num_rows  # Endless in practice, and far from where lengths overflow.

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.global_index(index)]

    def global_index(self, index: int) -> int:
        """Where this process' row `index` stands in the sequence of all rows."""
        batch, row = divmod(index, self.num_rows)
        return batch * self._batch_size + self._process_index * self.num_rows + row
