"""Token cache: each document is tokenised once, into flat files that are read through `np.memmap`.

Documents are stored without EOS: objectives add it where they need it, and offsets tell where a document ends.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Integer

from switchjax.data.cache import cached
from switchjax.data.datasets import TextDataset
from switchjax.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents of one split as token ids.

    Attributes:
        tokens: all documents one after the other, without EOS.
        offsets: document d is `tokens[offsets[d]:offsets[d + 1]]`.
        num_bytes: size of the text in UTF-8.
        checksum: CRC-32 of all tokens and offsets.
    """

    tokens: Integer[np.ndarray, "tokens"]
    offsets: Integer[np.ndarray, "documents_plus_1"]
    num_bytes: int
    checksum: int


def tokenize(dataset: TextDataset, split: str, vocabulary: Vocabulary, directory: Path) -> TokenizedDocuments:
    """The tokens of a split, made once per vocabulary and corpus version. The caller holds `directory.locked`.

    Raises:
        UserError: for a corrupt record.
    """
    text = Path(dataset.name, dataset.version, dataset.text_feature)
    name = "tokens" / text / vocabulary.fingerprint / split
    return cached(directory, name, _load, lambda folder: _write(dataset, split, vocabulary, folder))


def _load(cache: Path) -> TokenizedDocuments:
    facts = json.loads((cache / "facts.json").read_text())
    offsets = np.fromfile(cache / "offsets.bin", "<i8")
    size = (cache / "tokens.bin").stat().st_size
    dtype = np.dtype({2: "<u2", 4: "<u4"}[facts["bytes_per_token"]])
    num_bytes, checksum = int(facts["num_bytes"]), int(facts["checksum"])
    if len(offsets) < 1 or offsets[0] != 0 or np.any(np.diff(offsets) < 0) or offsets[-1] * dtype.itemsize != size:
        raise ValueError("its files have contradictory sizes")
    # np.memmap refuses an empty file.
    tokens = np.memmap(cache / "tokens.bin", dtype, "r") if size else np.zeros(0, dtype)
    return TokenizedDocuments(tokens, offsets, num_bytes, checksum)


def _write(dataset: TextDataset, split: str, vocabulary: Vocabulary, folder: Path) -> None:
    folder.mkdir()
    dtype = np.dtype("<u2" if vocabulary.size <= 2**16 else "<u4")
    with (folder / "tokens.bin").open("wb") as file:
        lengths, num_bytes, checksum = _write_tokens(dataset.texts(split), vocabulary, dtype, file)
    offsets = np.cumsum([0, *lengths], dtype="<i8").tobytes()
    (folder / "offsets.bin").write_bytes(offsets)
    checksum = zlib.crc32(offsets, checksum)
    facts = {"bytes_per_token": dtype.itemsize, "num_bytes": num_bytes, "checksum": checksum}
    (folder / "facts.json").write_text(json.dumps(facts))


def _write_tokens(
    blocks: Iterator[list[str]], vocabulary: Vocabulary, dtype: np.dtype, file: BinaryIO
) -> tuple[list[int], int, int]:
    """Writes the tokens of all documents to `file`; returns the documents' lengths, the text's bytes and the CRC-32."""
    lengths: list[int] = []
    num_bytes = checksum = 0
    for texts in blocks:
        documents = vocabulary.encode_batch(texts)
        lengths += map(len, documents)
        num_bytes += sum(len(text.encode()) for text in texts)
        tokens = np.concatenate(documents).astype(dtype).tobytes()
        checksum = zlib.crc32(tokens, checksum)
        file.write(tokens)
    return lengths, num_bytes, checksum
