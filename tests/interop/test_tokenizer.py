"""A tokenizer is read as a vocabulary if its ids allow it, and its files are kept in any case."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from switchjax.config import Config, MeshConfig
from switchjax.data.vocabulary import EOS, PAD, Vocabulary, train_vocabulary
from switchjax.interop.convert import config_of, from_huggingface, to_huggingface
from switchjax.interop.tokenizer import (
    export_tokenizer,
    keep_files,
    own_vocabulary,
    read_vocabulary,
    renumbering,
    special_tokens,
    vocabulary_sizes,
)
from switchjax.models.model import Model
from switchjax.training.evaluation import load_model
from tests.interop.examples import FIXTURES, load_fixture, one_device
from tests.models.families import FAMILIES
from tests.stories import story

TEXTS = [story(seed) for seed in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vocabulary") / "own.model"
    train_vocabulary(TEXTS, 330, path)
    return path.read_bytes()


def folders(tmp_path: Path, *names: str) -> list[Path]:
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.mkdir()
    return paths


@pytest.mark.parametrize("settings", ['{"extra_ids": Infinity}', '{"extra_ids": null}', "[]", "", None])
def test_settings_that_cannot_be_read_leave_the_tokenizer_aside(
    tmp_path: Path, model: bytes, settings: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spiece.model").write_bytes(model)
    if settings is None:
        (tmp_path / "tokenizer_config.json").mkdir()
    else:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    assert read_vocabulary(tmp_path) is None
    assert "tokenizer_config.json gives no valid number of extra_ids; the file is kept" in caplog.text


def test_a_vocabulary_survives_the_way_there_and_back(tmp_path: Path, model: bytes) -> None:
    workdir, folder = folders(tmp_path, "workdir", "folder")
    vocabulary = Vocabulary(model, 16)
    export_tokenizer(workdir, folder, vocabulary)
    assert vocabulary_sizes(folder, 400) == {"data.vocabulary_size": 330, "data.num_sentinels": 16}
    back = read_vocabulary(folder)
    assert back is not None
    assert (back.model, back.num_sentinels) == (model, 16)
    assert renumbering(back, 400) is None
    assert special_tokens(back, Config()) == {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}


def test_files_are_kept_as_they_are(tmp_path: Path) -> None:
    files = {"tokenizer.json": b'{"any": 1}', "special_tokens_map.json": b"{}", "README.md": b"not a tokenizer's"}
    source, workdir, back = folders(tmp_path, "source", "workdir", "back")
    for name, content in files.items():
        (source / name).write_bytes(content)
    assert read_vocabulary(source) is None
    keep_files(source, workdir)
    export_tokenizer(workdir, back, None)
    assert {path.name: path.read_bytes() for path in back.iterdir()} == dict(list(files.items())[:2])


def test_sentinels_are_t5s_hundred_where_nothing_says_otherwise(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(model)
    assert vocabulary_sizes(tmp_path, 500) == {"data.vocabulary_size": 330, "data.num_sentinels": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 3}))
    assert vocabulary_sizes(tmp_path, 500)["data.num_sentinels"] == 3


def foreign(path: Path, num_pieces: int, **ids: int) -> None:
    """A SentencePiece model of letters with other special ids."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.lower().replace(".", "") for text in TEXTS),
            model_writer=file,
            vocab_size=num_pieces,
            minloglevel=2,
            **ids,
        )


def test_ids_of_a_model_without_pad_are_renumbered(tmp_path: Path) -> None:
    foreign(tmp_path / "tokenizer.model", 60, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    assert vocabulary_sizes(tmp_path, 64) == {"data.vocabulary_size": 60, "data.num_sentinels": 0}
    vocabulary = read_vocabulary(tmp_path)
    ids = renumbering(vocabulary, 64)
    assert ids is not None
    assert ids.tolist() == [1, 2, 0, *range(3, 64)]
    assert special_tokens(vocabulary, FAMILIES["mixtral"]) == {"bos_token_id": 1, "eos_token_id": 2}


def test_a_model_with_neither_pad_nor_bos_is_no_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign(tmp_path / "tokenizer.model", 60, unk_id=0, bos_id=-1, eos_id=1, pad_id=-1)
    assert read_vocabulary(tmp_path) is None
    assert "has neither pad nor bos" in caplog.text


def test_mixtral_reads_text_in_our_ids_as_in_its_own(tmp_path: Path) -> None:
    """Rows of vectors are renumbered with the tokenizer, and back again."""
    source, back = tmp_path / "source", tmp_path / "back"
    shutil.copytree(FIXTURES / "mixtral", source)
    foreign(source / "tokenizer.model", 40, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    config = dataclasses.replace(config_of(source), mesh=MeshConfig(data=8))
    from_huggingface(source, tmp_path / "workdir", config)
    vocabulary = own_vocabulary(tmp_path / "workdir", config)
    assert vocabulary is not None
    ours = [PAD, *vocabulary.encode("the keeper counted")]
    theirs = [1, *sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")).encode("the keeper counted")]

    @jax.jit
    def logits(model: Model, ids: jax.Array) -> jax.Array:
        return model({"decoder_inputs": ids, "decoder_segments": jnp.ones_like(ids)}, None)[0]

    _, renumbered = load_model(config, tmp_path / "workdir", one_device())
    actual = logits(renumbered, jnp.asarray([ours], jnp.int32))
    wanted = logits(load_fixture("mixtral")[1], jnp.asarray([theirs], jnp.int32))
    np.testing.assert_allclose(actual[..., PAD], wanted[..., 1], rtol=1e-5)
    np.testing.assert_allclose(actual[..., EOS], wanted[..., 2], rtol=1e-5)
    np.testing.assert_allclose(actual[..., 3:], wanted[..., 3:], rtol=1e-5, atol=1e-6)

    to_huggingface(tmp_path / "workdir", back)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 2
