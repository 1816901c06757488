import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from switchjax.config import DataConfig, UserError
from switchjax.data.rows import HostBatch
from switchjax.data.text import TextData
from switchjax.data.vocabulary import EOS, PAD
from tests.data.conftest import assert_resumes, assert_same, divided, joined, padded, take
from tests.data.spans import restore


def chunks_of(batch: HostBatch, data: TextData) -> list[tuple[int, ...]]:
    """The tokens of every segment, uncorrupted."""
    chunks = []
    for row in range(len(batch["encoder_tokens"])):
        for segment in range(1, batch["encoder_segments"][row].max() + 1):
            inputs = batch["encoder_tokens"][row][batch["encoder_segments"][row] == segment]
            targets = batch["decoder_targets"][row][batch["decoder_segments"][row] == segment]
            chunks.append(
                tuple(restore(inputs, targets, data.vocabulary.size - data.vocabulary.num_sentinels).tolist())
            )
    return chunks


def expected_chunks(data: TextData, corpus: str, split: str) -> collections.Counter[tuple[int, ...]]:
    chunks, tokens = data._chunks(corpus, split), data._documents[corpus][split].tokens
    pairs = zip(chunks.starts, chunks.lengths, strict=True)
    return collections.Counter(tuple(tokens[start : start + length].tolist()) for start, length in pairs)


def test_shapes_and_segments(data: TextData, config: DataConfig) -> None:
    encoder, decoder = (8, config.encoder_length), (8, config.decoder_length)
    for batch in take(data.train_batches(), 5):
        assert {name: array.shape for name, array in batch.items()} == {
            "encoder_tokens": encoder,
            "encoder_segments": encoder,
            "decoder_inputs": decoder,
            "decoder_targets": decoder,
            "decoder_segments": decoder,
        }
        assert all(array.dtype == np.int32 for array in batch.values())
        for side in ("encoder", "decoder"):
            segments = batch[f"{side}_segments"]
            steps = np.diff(segments)
            # Numbers rise by one within a row and are followed by nothing but padding.
            assert (segments[:, 0] == 1).all()
            assert ((steps == 0) | (steps == 1) | (segments[:, 1:] == 0)).all()
        assert (batch["encoder_segments"].max(1) == batch["decoder_segments"].max(1)).all()
        assert (batch["encoder_tokens"][batch["encoder_segments"] == 0] == PAD).all()
        assert (batch["decoder_targets"][batch["decoder_segments"] == 0] == PAD).all()
        assert (batch["encoder_tokens"][batch["encoder_segments"] > 0] != PAD).all()


def test_decoder_inputs_are_targets_shifted_within_segments(data: TextData) -> None:
    for batch in take(data.train_batches(), 3):
        for inputs, targets, segments in zip(
            batch["decoder_inputs"], batch["decoder_targets"], batch["decoder_segments"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                own = targets[segments == segment]
                assert inputs[segments == segment].tolist() == [PAD, *own[:-1]]
                assert own[-1] == EOS
            assert (inputs[segments == 0] == PAD).all()


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_chunk_once(data: TextData, config: DataConfig, pack: bool) -> None:
    one = TextData(
        dataclasses.replace(config, pack=pack, batch_size=1), data.vocabulary, {"tales": data._documents["tales"]}
    )
    rows = len(one._rows("tales", "train", config.seed))
    batches = take(one.train_batches(), 2 * rows)
    epochs = [[chunks_of(batch, one) for batch in batches[start : start + rows]] for start in (0, rows)]
    for epoch in epochs:
        assert collections.Counter(itertools.chain(*epoch)) == expected_chunks(one, "tales", "train")
    assert epochs[0] != epochs[1]
    # The second epoch draws other spans for the same text; only very short chunks have few to choose from.
    first, second = ({batch["encoder_tokens"].tobytes() for batch in part} for part in (batches[:rows], batches[rows:]))
    assert len(first & second) < 0.1 * rows


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_batches_do_not_depend_on_the_number_of_processes(data: TextData, processes: int) -> None:
    shares = [take(data.train_batches(own), 6) for own in divided(processes)]
    assert_same(joined(shares), take(data.train_batches(), 6))


def test_a_process_may_have_rows_that_do_not_lie_side_by_side(data: TextData) -> None:
    whole = take(data.train_batches(), 6)
    own = [0, 1, 4, 7]
    expected = [{name: rows[own] for name, rows in batch.items()} for batch in whole]
    batches = data.train_batches(own)
    assert_same(take(batches, 3), expected[:3])
    # The position is the same for all rows, and so good for a process with others.
    other = data.train_batches([2])
    other.set_state(batches.get_state())
    assert_same(take(other, 3), [{name: rows[[2]] for name, rows in batch.items()} for batch in whole[3:]])


def test_resumes_exactly_in_the_middle_of_an_epoch(data: TextData) -> None:
    assert_resumes(data)


def test_the_seed_decides_order_and_spans(data: TextData, config: DataConfig) -> None:
    same = TextData(config, data.vocabulary, data._documents)
    other = TextData(dataclasses.replace(config, seed=1), data.vocabulary, data._documents)
    assert_same(take(same.train_batches(), 3), take(data.train_batches(), 3))
    first, second = next(other.train_batches()), next(data.train_batches())
    assert not np.array_equal(first["encoder_tokens"], second["encoder_tokens"])


def test_rates_decide_the_mixture(data: TextData, config: DataConfig) -> None:
    mixed = TextData(padded(config, rates=(1.0, 3.0)), data.vocabulary, data._documents)
    tales = expected_chunks(mixed, "tales", "train")
    chunks = [chunk for batch in take(mixed.train_batches(), 50) for chunk in chunks_of(batch, mixed)]
    assert len(chunks) == 400
    assert abs(sum(chunk in tales for chunk in chunks) - 100) <= 1


def test_evaluation_is_one_full_pass(data: TextData) -> None:
    batches = list(data.evaluation_batches("yarns", "test"))
    chunks = [chunk for batch in batches for chunk in chunks_of(batch, data)]
    assert collections.Counter(chunks) == expected_chunks(data, "yarns", "test")
    assert all(batch["encoder_tokens"].shape == (8, 96) for batch in batches)
    assert_same(batches[:1], list(data.evaluation_batches("yarns", "test", limit=1)))


def test_evaluation_ignores_the_training_seed(data: TextData, config: DataConfig) -> None:
    other = TextData(dataclasses.replace(config, seed=5), data.vocabulary, data._documents)
    assert_same(list(data.evaluation_batches("tales", "test")), list(other.evaluation_batches("tales", "test")))


def test_evaluation_divides_over_processes(data: TextData) -> None:
    shares = [list(data.evaluation_batches("tales", "test", own=own)) for own in divided(2)]
    assert_same(joined(shares), list(data.evaluation_batches("tales", "test")))


def test_held_out_text_is_never_trained_on(data: TextData) -> None:
    for corpus in data.corpora:
        trained = {text for chunk in expected_chunks(data, corpus, "train") for text in [chunk] if len(chunk) > 20}
        for split in ("validation", "test"):
            assert trained.isdisjoint(expected_chunks(data, corpus, split))


def test_statistics_count_every_token(data: TextData) -> None:
    statistics = data.statistics()
    assert [(entry.corpus, entry.split) for entry in statistics[:3]] == [
        ("tales", "train"),
        ("tales", "validation"),
        ("tales", "test"),
    ]
    assert sum(entry.documents for entry in statistics) == 300
    for entry in statistics:
        kept = expected_chunks(data, entry.corpus, entry.split)
        assert entry.tokens == entry.dropped_tokens + sum(len(chunk) * count for chunk, count in kept.items())
        assert entry.chunks == kept.total()


def test_preparing_twice_makes_nothing_again(data: TextData, config: DataConfig) -> None:
    files = {path: path.stat().st_mtime_ns for path in Path(config.directory).rglob("*") if path.is_file()}
    again = TextData.prepare(config)
    assert {path: path.stat().st_mtime_ns for path in files} == {
        **files,
        Path(config.directory) / "prepare.lock": (Path(config.directory) / "prepare.lock").stat().st_mtime_ns,
    }
    assert again.fingerprint == data.fingerprint
    assert_same(take(again.train_batches(), 2), take(data.train_batches(), 2))


def test_the_fingerprint_changes_with_any_text(data: TextData, config: DataConfig) -> None:
    tales = data._documents["tales"]
    other = dataclasses.replace(tales["test"], checksum=tales["test"].checksum ^ 1)
    documents = {**data._documents, "tales": {**tales, "test": other}}
    assert TextData(config, data.vocabulary, documents).fingerprint != data.fingerprint


def test_preparing_elsewhere_gives_the_same_batches(data: TextData, config: DataConfig, tmp_path: Path) -> None:
    elsewhere = TextData.prepare(dataclasses.replace(config, directory=str(tmp_path)))
    assert elsewhere.fingerprint == data.fingerprint
    assert_same(take(elsewhere.train_batches(), 2), take(data.train_batches(), 2))


def test_a_corpus_that_cannot_be_had_is_passed_over(
    data: TextData, config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    rates = dataclasses.replace(config, corpora=("lost", "tales"), rates=(0.9, 0.1))
    assert TextData.prepare(rates).corpora == ("tales",)
    assert caplog.messages == ["Corpus lost is passed over: cannot fetch the own package -1: it is lost"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpora": ("lost",)}, "none of the corpora can be had here: lost"),
        ({"num_sentinels": 2}, r"num_sentinels=2 is too few: .* 5 spans"),
        ({"encoder_length": 2}, "too short"),
        ({"vocabulary": "nowhere.model"}, "cannot read the vocabulary nowhere.model"),
        ({"vocabulary_size": 100_000}, "cannot train a vocabulary of data.vocabulary_size=100000"),
        ({"directory": "/dev/null/data"}, "cannot prepare data in /dev/null/data"),
    ],
)
def test_refuses_what_cannot_work(data: TextData, config: DataConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextData.prepare(dataclasses.replace(config, **changes))


def test_refuses_unknown_names(data: TextData) -> None:
    with pytest.raises(UserError, match="did you mean 'tales'"):
        data.evaluation_batches("tale", "test")
    with pytest.raises(UserError, match="unknown value 'dev'"):
        data.evaluation_batches("tales", "dev")
