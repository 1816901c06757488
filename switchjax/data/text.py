"""Batches of text: the way from corpora on disk to the arrays of a train step."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grain
import numpy as np

from switchjax.config import DataConfig
from switchjax.data.causal import Causal
from switchjax.data.data import Data, derived_seed, fingerprint
from switchjax.data.datasets import TextDataset, open_datasets
from switchjax.data.directory import preparing
from switchjax.data.objective import Objective, Tokens
from switchjax.data.packing import Chunks, Rows, one_chunk_a_row, pack, split_into_chunks
from switchjax.data.rows import Row, RowSource, fill_row
from switchjax.data.span_corruption import SpanCorruption
from switchjax.data.splits import SPLITS
from switchjax.data.tokens import TokenizedDocuments, tokenize
from switchjax.data.vocabulary import Vocabulary, sample_texts, train_vocabulary

_VOCABULARY_CHARACTERS = 4_000_000
"""Text that a vocabulary is trained on."""


@dataclass(frozen=True)
class SplitStatistics:
    """Sizes of one split of one corpus.

    Attributes:
        corpus: its name.
        split: train, validation or test.
        documents: number of documents.
        bytes: of their text, in UTF-8.
        tokens: of their text.
        chunks: stretches of documents, each a segment of a row.
        rows: of batches in one pass.
        dropped_chunks: ends of documents that were too short for the objective.
        dropped_tokens: tokens in those.
    """

    corpus: str
    split: str
    documents: int
    bytes: int
    tokens: int
    chunks: int
    rows: int
    dropped_chunks: int
    dropped_tokens: int


class TextData(Data):
    """Corpora, tokenised, as batches for the objective of the config.

    Attributes:
        vocabulary: given or trained.
    """

    vocabulary: Vocabulary

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        documents: Mapping[str, Mapping[str, TokenizedDocuments]],
    ) -> None:
        """See `prepare`, which makes `documents[corpus][split]`.

        Raises:
            UserError: if the objective, the lengths and the vocabulary of `config` do not fit each other, or a corpus
                has no text to train on.
        """
        super().__init__(config, tuple(documents), _fingerprint(vocabulary, documents))
        self.vocabulary = vocabulary
        self._documents = documents
        self._objective = OBJECTIVES[config.objective].from_config(config, vocabulary)
        self._chunks = cache(self._make_chunks)
        self._rows = cache(self._make_rows)
        self._check_trainable()

    @classmethod
    def prepare(cls, config: DataConfig) -> "TextData":
        """Fetches, tokenises and opens the corpora; what is on disk already is not made again.

        Processes that prepare the same directory at the same time wait for one another; one that is
        killed leaves nothing behind that could be taken for complete.

        Raises:
            UserError: if no corpus can be had, one holds no text, the directory cannot be written, the vocabulary
                cannot be read or trained, a record is corrupt, or the config contradicts itself.
        """
        with preparing(config.directory) as directory:
            opened = open_datasets(config.corpora, directory)
            corpora = {name: TextDataset.of(dataset, config.text_feature) for name, dataset in opened.items()}
            vocabulary = _vocabulary(config, corpora, directory)
            documents = {
                name: {split: tokenize(dataset, split, vocabulary, directory) for split in SPLITS}
                for name, dataset in corpora.items()
            }
        return cls(config, vocabulary, documents)

    def statistics(self) -> list[SplitStatistics]:
        """Sizes of every split of every corpus."""
        return [self._split_statistics(corpus, split) for corpus in self.corpora for split in SPLITS]

    def _split_statistics(self, corpus: str, split: str) -> SplitStatistics:
        documents, chunks = self._documents[corpus][split], self._chunks(corpus, split)
        return SplitStatistics(
            corpus=corpus,
            split=split,
            documents=len(documents.offsets) - 1,
            bytes=documents.num_bytes,
            tokens=len(documents.tokens),
            chunks=len(chunks.starts),
            rows=len(self._rows(corpus, split, self._config.seed)),
            dropped_chunks=chunks.dropped,
            dropped_tokens=chunks.dropped_tokens,
        )

    def _make_chunks(self, corpus: str, split: str) -> Chunks:
        return split_into_chunks(self._documents[corpus][split].offsets, self._objective)

    def _make_rows(self, corpus: str, split: str, seed: int) -> Rows:
        lengths = self._chunks(corpus, split).lengths
        if not self._config.pack:
            return one_chunk_a_row(len(lengths))
        return pack(lengths, self._objective, np.random.default_rng(derived_seed(seed, "pack", corpus)))

    def _row_source(self, corpus: str, split: str, seed: int) -> RowSource:
        tokens = self._documents[corpus][split].tokens
        return RowSource(tokens, self._chunks(corpus, split), self._rows(corpus, split, seed))

    def _train_source(self, corpus: str) -> RowSource:
        return self._row_source(corpus, "train", self._config.seed)

    def _train_row(self, item: list[Tokens], rng: np.random.Generator) -> Row:
        return fill_row([self._objective.example(chunk, rng) for chunk in item], self._objective.row_lengths)

    def _evaluation_rows(self, corpus: str, split: str) -> grain.MapDataset[Row]:
        source = grain.MapDataset.source(self._row_source(corpus, split, seed=0))
        return source.random_map(self._train_row, seed=derived_seed(0, "corrupt", corpus))

    def _empty_row(self) -> Row:
        return fill_row([], self._objective.row_lengths)


def _fingerprint(vocabulary: Vocabulary, documents: Mapping[str, Mapping[str, TokenizedDocuments]]) -> str:
    checksums = [
        [corpus, split, text.checksum] for corpus, splits in documents.items() for split, text in splits.items()
    ]
    return fingerprint([vocabulary.fingerprint, vocabulary.num_sentinels, *checksums])


def _vocabulary(config: DataConfig, corpora: Mapping[str, TextDataset], directory: Path) -> Vocabulary:
    """The vocabulary that the config names, or one trained on these very corpora."""
    if config.vocabulary:
        return Vocabulary.load(config.vocabulary, config.num_sentinels)
    versions = sorted((name, dataset.version) for name, dataset in corpora.items())
    key = hashlib.sha256(json.dumps([versions, config.text_feature, _VOCABULARY_CHARACTERS]).encode()).hexdigest()[:16]
    path = directory / "vocabularies" / f"{config.vocabulary_size}-{key}.model"
    if not path.exists():
        blocks = [corpora[name].texts("train") for name, _ in versions]
        train_vocabulary(sample_texts(blocks, _VOCABULARY_CHARACTERS), config.vocabulary_size, path)
    return Vocabulary.load(path, config.num_sentinels)


OBJECTIVES: dict[str, type[Objective]] = {"span_corruption": SpanCorruption, "causal": Causal}
