import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from switchjax.data.datasets import TextDataset
from switchjax.data.text import TextData
from switchjax.data.tokens import tokenize


@pytest.fixture
def dataset(prepared: dict[str, TextDataset]) -> TextDataset:
    return prepared["tales"]


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextDataset, "texts", lambda *_: pytest.fail("tokenised again"))


def test_tokens_are_the_documents(data: TextData, dataset: TextDataset, tmp_path: Path) -> None:
    tokens = tokenize(dataset, "test", data.vocabulary, tmp_path)
    texts = [text for block in dataset.texts("test") for text in block]
    ends = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    assert [data.vocabulary.decode(tokens.tokens[start:end]) for start, end in ends] == texts
    assert tokens.num_bytes == sum(len(text.encode()) for text in texts)
    assert tokens.tokens.dtype == np.dtype("<u2")


def test_tokenised_once(data: TextData, dataset: TextDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(dataset, "test", data.vocabulary, tmp_path)
    forbid_reading(monkeypatch)
    second = tokenize(dataset, "test", data.vocabulary, tmp_path)
    np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.bin", "facts.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_cache_is_made_again(
    data: TextData, dataset: TextDataset, tmp_path: Path, file: str, damage: str
) -> None:
    expected = tokenize(dataset, "test", data.vocabulary, tmp_path).tokens.copy()
    (path,) = tmp_path.rglob(file)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    np.testing.assert_array_equal(tokenize(dataset, "test", data.vocabulary, tmp_path).tokens, expected)


def test_a_cache_without_a_checksum_is_made_again(data: TextData, dataset: TextDataset, tmp_path: Path) -> None:
    expected = tokenize(dataset, "test", data.vocabulary, tmp_path).checksum
    (path,) = tmp_path.rglob("facts.json")
    facts = json.loads(path.read_text())
    del facts["checksum"]
    path.write_text(json.dumps(facts))
    assert tokenize(dataset, "test", data.vocabulary, tmp_path).checksum == expected


def cut_last_word(texts: list[str]) -> list[str]:
    return [*texts[:-1], texts[-1].rpartition(" ")[0]]


def other_stops(texts: list[str]) -> list[str]:
    """Changes tokens, but not their number."""
    return [*texts[:-1], texts[-1].replace("e", "a")]


@pytest.mark.parametrize("change", [cut_last_word, other_stops])
def test_the_checksum_changes_with_the_last_document(
    data: TextData,
    dataset: TextDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[str]], list[str]],
) -> None:
    blocks = list(dataset.texts("train"))
    expected = tokenize(dataset, "train", data.vocabulary, tmp_path).checksum
    monkeypatch.setattr(TextDataset, "texts", lambda *_: iter([*blocks[:-1], change(blocks[-1])]))
    changed = dataclasses.replace(dataset, version="1.0.1")
    assert tokenize(changed, "train", data.vocabulary, tmp_path).checksum != expected


@pytest.mark.parametrize("change", [{"version": "1.0.1"}, {"text_feature": "id"}])
def test_another_version_or_feature_is_tokenised_anew(
    data: TextData, dataset: TextDataset, tmp_path: Path, change: dict[str, str]
) -> None:
    tokenize(dataset, "test", data.vocabulary, tmp_path)
    tokenize(dataclasses.replace(dataset, **change), "test", data.vocabulary, tmp_path)
    assert len(list(tmp_path.rglob("tokens.bin"))) == 2
