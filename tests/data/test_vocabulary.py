from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from switchjax.config import UserError
from switchjax.data.text import TextData
from switchjax.data.vocabulary import EOS, PAD, UNK, Vocabulary, sample_texts, train_vocabulary
from tests.stories import story

TEXTS = [story(seed) for seed in range(60)]


def test_special_ids_are_t5s(data: TextData) -> None:
    vocabulary = data.vocabulary
    assert (PAD, EOS, UNK) == (0, 1, 2)
    assert vocabulary.size == 330 + 16
    assert vocabulary.encode("<extra_id_0><extra_id_15>") == [345, 330]
    with pytest.raises(UserError, match="16 sentinels"):
        vocabulary.encode("<extra_id_16>")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "\n",
            "one\ntwo\n\n three",
            "  spaces  kept ",
            "naïve café — 漢字 🦜",
            "tab\tnull\x00",
            "lighthouse",
        ),
        *("keep<extra_id_0>er of<extra_id_1> the<extra_id_2>", "<extra_id_3>", "<extra_id_0><extra_id_1> ship"),
    ],
)
def test_round_trip(data: TextData, text: str) -> None:
    assert data.vocabulary.decode(data.vocabulary.encode(text)) == text


def test_a_span_brings_its_own_space(data: TextData) -> None:
    assert data.vocabulary.encode("the <extra_id_0> of") == data.vocabulary.encode("the<extra_id_0> of")


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
def test_nothing_is_unknown(data: TextData, text: str) -> None:
    (ids,) = data.vocabulary.encode_batch([text])
    assert not np.isin(ids, [PAD, EOS, UNK]).any()
    assert data.vocabulary.decode(ids) == text


def test_documents_hold_no_sentinels(data: TextData) -> None:
    (ids,) = data.vocabulary.encode_batch(["see <extra_id_0> here"])
    assert (ids < 330).all()


def test_decoding_stops_at_eos_and_refuses_foreign_ids(data: TextData) -> None:
    ids = data.vocabulary.encode("the ship")
    assert data.vocabulary.decode([PAD, *ids, EOS, *ids]) == "the ship"
    with pytest.raises(ValueError, match="id 346"):
        data.vocabulary.decode([346])


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in ("first", "second"):
        train_vocabulary(TEXTS, 310, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_failed_training_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary_size=9999"):
        train_vocabulary(TEXTS, 9999, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_sample_takes_equal_shares() -> None:
    sample = list(sample_texts([[["a" * 30, "a" * 90], ["a" * 90]], [["b" * 300]]], 200))
    assert sum(text.count("a") for text in sample) == sum(text.count("b") for text in sample) == 100


def foreign_model(tmp_path: Path, **ids: int) -> Path:
    """A model whose special ids are not T5's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=60,
        minloglevel=2,
        **ids,
    )
    return tmp_path / "foreign.model"


@pytest.mark.parametrize(
    ("bos", "pad", "size", "first"),
    [
        (1, -1, 60, [1, 2, 0, 3]),  # LLaMA's: bos is what text begins with, and there is no pad
        (-1, -1, 61, [-1, 2, 0, 1]),
        (1, 3, 60, [3, 2, 0, 1]),
    ],
)
def test_a_model_with_other_special_ids_is_renumbered(
    tmp_path: Path, bos: int, pad: int, size: int, first: list[int]
) -> None:
    path = foreign_model(tmp_path, unk_id=0, bos_id=bos, eos_id=2, pad_id=pad)
    vocabulary = Vocabulary.load(path, num_sentinels=5)
    assert vocabulary.size == size + 5
    assert vocabulary.model_ids[:4].tolist() == first
    ids = vocabulary.encode("the keeper <extra_id_0> Ж")
    assert UNK in ids
    assert not {PAD, EOS} & set(ids)
    assert vocabulary.decode(vocabulary.encode("the keeper<extra_id_0> of ships")) == "the keeper<extra_id_0> of ships"


def test_a_model_without_eos_is_refused(tmp_path: Path) -> None:
    path = foreign_model(tmp_path, unk_id=0, bos_id=1, eos_id=-1)
    with pytest.raises(UserError, match="needs an eos and an unk piece"):
        Vocabulary.load(path, num_sentinels=5)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04K\x01."])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(UserError, match="cannot use the vocabulary"):
        Vocabulary.load(tmp_path / "model", num_sentinels=5)
