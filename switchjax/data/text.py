"""Batches of text, made from corpora on disk."""

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
from switchjax.data.directory import locked_data_directory
from switchjax.data.objective import Objective, TokenIds
from switchjax.data.packing import Chunks, RowPlan, one_chunk_per_row, pack, split_into_chunks
from switchjax.data.rows import Row, RowSource, fill_row
from switchjax.data.span_corruption import SpanCorruption
from switchjax.data.splits import SPLITS
from switchjax.data.tokens import TokenizedDocuments, tokenize
from switchjax.data.vocabulary import Vocabulary, sample_texts, train_vocabulary

_VOCABULARY_CHARACTERS = 4_000_000
"""How much text a vocabulary is trained on."""


@dataclass(frozen=True)
class SplitStatistics:
    """Sizes of one split of one corpus.

    Attributes:
        corpus: name of the corpus.
        split: train, validation or test.
        documents: number of documents.
        bytes: size of the text in UTF-8.
        tokens: number of tokens of the text.
        chunks: number of chunks; each is a segment of a row.
        rows: number of rows in one pass.
        dropped_chunks: ends of documents that are too short for the objective.
        dropped_tokens: tokens in the dropped chunks.
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
    """Batches of tokenised text for the config's objective.

    Attributes:
        vocabulary: the one that the config names, or one trained on the corpora.
    """

    vocabulary: Vocabulary

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        documents: Mapping[str, Mapping[str, TokenizedDocuments]],
    ) -> None:
        """Use `prepare`, which makes `documents[corpus][split]`.

        Raises:
            UserError: if the objective, the row lengths and the vocabulary do not fit together, or a corpus has no text
                to train on.
        """
        checksums = [
            [corpus, split, text.checksum] for corpus, splits in documents.items() for split, text in splits.items()
        ]
        facts = [vocabulary.fingerprint, vocabulary.num_sentinels, *checksums]
        super().__init__(config, tuple(documents), fingerprint(facts))
        self.vocabulary = vocabulary
        self._documents = documents
        self._objective = OBJECTIVES[config.objective].from_config(config, vocabulary)
        # Chunks and rows are planned when first used: training needs no rows of the test split.
        self._chunks = cache(self._make_chunks)
        self._rows = cache(self._make_rows)
        self._check_trainable()

    @classmethod
    def prepare(cls, config: DataConfig) -> "TextData":
        """Fetches, tokenises and opens the corpora, and reuses what is already on disk.

        Processes that prepare the same directory at the same time wait for each other. A process that is killed leaves
        no incomplete data that a later one would use.

        Raises:
            UserError: if no corpus is available, one holds no text, the directory cannot be written, the vocabulary
                cannot be read or trained, a record is corrupt, or the config contradicts itself.
        """
        with locked_data_directory(config.directory) as directory:
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

    def _make_rows(self, corpus: str, split: str, seed: int) -> RowPlan:
        lengths = self._chunks(corpus, split).lengths
        if not self._config.pack:
            return one_chunk_per_row(len(lengths))
        return pack(lengths, self._objective, np.random.default_rng(derived_seed(seed, "pack", corpus)))

    def _row_source(self, corpus: str, split: str, seed: int) -> RowSource:
        tokens = self._documents[corpus][split].tokens
        return RowSource(tokens, self._chunks(corpus, split), self._rows(corpus, split, seed))

    def _train_source(self, corpus: str) -> RowSource:
        return self._row_source(corpus, "train", self._config.seed)

    def _train_row(self, item: list[TokenIds], rng: np.random.Generator) -> Row:
        return fill_row([self._objective.example(chunk, rng) for chunk in item], self._objective.row_lengths)

    def _evaluation_rows(self, corpus: str, split: str) -> grain.MapDataset[Row]:
        source = grain.MapDataset.source(self._row_source(corpus, split, seed=0))
        return source.random_map(self._train_row, seed=derived_seed(0, "corrupt", corpus))

    def _empty_row(self) -> Row:
        return fill_row([], self._objective.row_lengths)


def _vocabulary(config: DataConfig, corpora: Mapping[str, TextDataset], directory: Path) -> Vocabulary:
    """The vocabulary that the config names, or one trained on these corpora."""
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
