"""Text for decoder-only models; what holds of either objective is in test_text."""

import collections
import dataclasses

import numpy as np
import pytest

from switchjax.config import DataConfig, UserError
from switchjax.data.causal import Causal
from switchjax.data.rows import HostBatch
from switchjax.data.text import TextData
from switchjax.data.vocabulary import EOS, PAD
from tests.data.conftest import assert_resumes, assert_same, divided, joined, take


@pytest.fixture(scope="module")
def causal_config(config: DataConfig) -> DataConfig:
    return dataclasses.replace(config, objective="causal", num_sentinels=0, decoder_length=200)


@pytest.fixture(scope="module")
def causal(causal_config: DataConfig) -> TextData:
    return TextData.prepare(causal_config)


def segments(batch: HostBatch) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every segment."""
    inputs, targets, numbers = batch["decoder_inputs"], batch["decoder_targets"], batch["decoder_segments"]
    return [
        (inputs[row][numbers[row] == segment].tolist(), targets[row][numbers[row] == segment].tolist())
        for row in range(len(numbers))
        for segment in range(1, numbers[row].max() + 1)
    ]


def expected_targets(data: TextData, corpus: str, split: str, length: int) -> collections.Counter[tuple[int, ...]]:
    """Every document with its EOS, cut."""
    documents = data._documents[corpus][split]
    texts = [
        [*documents.tokens[start:end].tolist(), EOS]
        for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    ]
    return collections.Counter(
        tuple(text[start : start + length]) for text in texts for start in range(0, len(text), length)
    )


def test_batches_hold_a_decoder_only(causal: TextData, causal_config: DataConfig) -> None:
    for batch in take(causal.train_batches(), 3):
        assert set(batch) == {"decoder_inputs", "decoder_targets", "decoder_segments"}
        assert {(array.shape, array.dtype) for array in batch.values()} == {
            ((8, causal_config.decoder_length), np.dtype(np.int32))
        }
        padding = batch["decoder_segments"] == 0
        assert (batch["decoder_inputs"][padding] == PAD).all()
        assert (batch["decoder_targets"][padding] == PAD).all()


def test_inputs_are_targets_shifted_within_segments(causal: TextData) -> None:
    batches = take(causal.train_batches(), 40)
    # Most rows hold one long chunk; the ends of documents share theirs.
    assert max(batch["decoder_segments"].max() for batch in batches) > 1
    for batch in batches:
        for inputs, targets in segments(batch):
            assert inputs == [PAD, *targets[:-1]]
            assert EOS not in targets[:-1]


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_predicts_every_token_once_and_an_eos_a_document(
    causal: TextData, causal_config: DataConfig, pack: bool
) -> None:
    config = dataclasses.replace(causal_config, pack=pack, batch_size=1)
    one = TextData(config, causal.vocabulary, {"tales": causal._documents["tales"]})
    rows = len(one._rows("tales", "train", config.seed))
    epochs = [take(one.train_batches(), 2 * rows)[start : start + rows] for start in (0, rows)]
    for epoch in epochs:
        targets = collections.Counter(tuple(targets) for batch in epoch for _, targets in segments(batch))
        assert targets == expected_targets(one, "tales", "train", config.decoder_length)
    assert [batch["decoder_targets"].tobytes() for batch in epochs[0]] != [
        batch["decoder_targets"].tobytes() for batch in epochs[1]
    ]
    if not pack:
        assert all(batch["decoder_segments"].max() == 1 for batch in epochs[0])


def test_evaluation_is_one_full_pass(causal: TextData, causal_config: DataConfig) -> None:
    batches = list(causal.evaluation_batches("yarns", "test"))
    targets = collections.Counter(tuple(targets) for batch in batches for _, targets in segments(batch))
    assert targets == expected_targets(causal, "yarns", "test", causal_config.decoder_length)
    assert all(batch["decoder_inputs"].shape == (8, 200) for batch in batches)


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(causal: TextData, processes: int) -> None:
    shares = [take(causal.train_batches(own), 6) for own in divided(processes)]
    assert_same(joined(shares), take(causal.train_batches(), 6))
    shares = [list(causal.evaluation_batches("tales", "test", own=own)) for own in divided(processes)]
    assert_same(joined(shares), list(causal.evaluation_batches("tales", "test")))


def test_resumes_exactly(causal: TextData) -> None:
    assert_resumes(causal)


def test_statistics_count_every_token_and_drop_none(causal: TextData) -> None:
    for entry in causal.statistics():
        documents = causal._documents[entry.corpus][entry.split]
        assert entry.tokens == len(documents.tokens)
        assert entry.dropped_chunks == entry.dropped_tokens == 0
        assert entry.chunks == expected_targets(causal, entry.corpus, entry.split, 200).total()


def test_tokens_are_shared_with_span_corruption(data: TextData, causal: TextData) -> None:
    # The texts are those of the cache, whatever the objective.
    for corpus in data.corpora:
        assert causal._documents[corpus]["train"].checksum == data._documents[corpus]["train"].checksum


def test_a_row_of_one_token_is_the_shortest() -> None:
    assert Causal(1).max_tokens == 1
    assert Causal(7).max_tokens == 7


def test_span_corruption_needs_sentinels(config: DataConfig) -> None:
    with pytest.raises(UserError, match="num_sentinels=0 is too few"):
        TextData.prepare(dataclasses.replace(config, num_sentinels=0))
