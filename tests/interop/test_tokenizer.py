"""A tokenizer on its way: as a vocabulary where ids are numbered as here, as files in any case."""

import json
from pathlib import Path

import pytest
import sentencepiece

from switchjax.config import Config, DataConfig
from switchjax.data.vocabulary import Vocabulary, train_vocabulary
from switchjax.interop.tokenizer import export_tokenizer, import_tokenizer, vocabulary_sizes
from switchjax.training.workdir import record_run
from tests.stories import story

TEXTS = [story(seed) for seed in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vocabulary") / "own.model"
    train_vocabulary(TEXTS, 330, path)
    return path.read_bytes()


def test_a_vocabulary_survives_the_way_there_and_back(tmp_path: Path, model: bytes) -> None:
    config = Config(data=DataConfig(vocabulary_size=330, num_sentinels=16))
    workdir, folder, back = (tmp_path / name for name in ("workdir", "folder", "back"))
    for path in (workdir, folder, back):
        path.mkdir()
    record_run(workdir, config, Vocabulary(model, 16))
    export_tokenizer(workdir, folder, config)
    assert vocabulary_sizes(folder, 400) == {"data.vocabulary_size": 330, "data.num_sentinels": 16}
    vocabulary = import_tokenizer(folder, back)
    assert vocabulary is not None
    assert (vocabulary.model, vocabulary.num_sentinels) == (model, 16)
    assert vocabulary.sentinel(0) == 345


def test_files_are_kept_as_they_are(tmp_path: Path) -> None:
    files = {"tokenizer.json": b'{"any": 1}', "special_tokens_map.json": b"{}", "README.md": b"not a tokenizer's"}
    source, workdir, back = (tmp_path / name for name in ("source", "workdir", "back"))
    for path in (source, workdir, back):
        path.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    assert import_tokenizer(source, workdir) is None
    export_tokenizer(workdir, back, Config())
    assert {path.name: path.read_bytes() for path in back.iterdir()} == dict(list(files.items())[:2])


def test_sentinels_are_t5s_hundred_where_nothing_says_otherwise(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(model)
    assert vocabulary_sizes(tmp_path, 500) == {"data.vocabulary_size": 330, "data.num_sentinels": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 3}))
    assert vocabulary_sizes(tmp_path, 500)["data.num_sentinels"] == 3


def test_a_model_that_numbers_its_pieces_otherwise_is_no_vocabulary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=60,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    assert vocabulary_sizes(tmp_path, 60) == {"data.vocabulary_size": 60, "data.num_sentinels": 0}
    assert "numbers pad, eos and unk otherwise than here" in caplog.text
