"""A row's arrays by hand, and which rows are a process' own."""

import grain
import numpy as np

from switchjax.data.rows import ProcessRows, fill_row
from switchjax.data.vocabulary import EOS, PAD


def test_segments_are_numbered_and_decoder_inputs_are_shifted_within_them() -> None:
    first = {"encoder": np.array([5, 6, EOS]), "decoder": np.array([7, EOS])}
    second = {"encoder": np.array([8, EOS]), "decoder": np.array([9, 10, EOS])}
    row = fill_row([first, second], {"encoder": 7, "decoder": 6})
    assert {name: values.tolist() for name, values in row.items()} == {
        "encoder_tokens": [5, 6, EOS, 8, EOS, PAD, PAD],
        "encoder_segments": [1, 1, 1, 2, 2, 0, 0],
        "decoder_inputs": [PAD, 7, PAD, 9, 10, PAD],
        "decoder_targets": [7, EOS, 9, 10, EOS, PAD],
        "decoder_segments": [1, 1, 2, 2, 2, 0],
    }
    assert all(values.dtype == np.int32 for values in row.values())


def test_a_row_without_texts_is_padding() -> None:
    row = fill_row([], {"decoder": 3})
    assert {name: values.tolist() for name, values in row.items()} == {
        name: [PAD] * 3 for name in ("decoder_inputs", "decoder_targets", "decoder_segments")
    }


def test_a_process_has_its_own_rows_of_every_batch() -> None:
    rows = grain.MapDataset.source([{"labels": np.array(number)} for number in range(12)])
    for own, expected in (([0, 3], [0, 3, 4, 7, 8, 11]), (None, [0, 1, 2, 3, 4, 5])):
        mine = ProcessRows(rows, 4, own)
        assert [mine[index]["labels"].item() for index in range(6)] == expected
