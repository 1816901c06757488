"""Batches of corrupted text: the way from corpora on disk to the arrays of a train step."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grain
import numpy as np

from switchjax.config import DataConfig, UserError, check_choice
from switchjax.data.datasets import Dataset, open_datasets
from switchjax.data.directory import data_directory, exclusive
from switchjax.data.packing import Chunks, Rows, one_chunk_a_row, pack, split_into_chunks
from switchjax.data.rows import Batch, ProcessRows, Row, RowSource, fill_row
from switchjax.data.span_corruption import SpanCorruption
from switchjax.data.splits import SPLITS
from switchjax.data.tokens import TokenizedDocuments, tokenize
from switchjax.data.vocabulary import Vocabulary, sample_texts, train_vocabulary

_VOCABULARY_CHARACTERS = 4_000_000
"""Text that a vocabulary is trained on."""
_PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class SplitStatistics:
    """Sizes of one split of one corpus.

    Attributes:
        corpus: its name.
        split: train, validation or test.
        documents: number of documents.
        bytes: of their text, in UTF-8.
        tokens: of their text.
        chunks: stretches of documents that are corrupted as one.
        rows: of batches in one pass.
        dropped_chunks: ends of documents that were too short to corrupt.
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


class TextData:
    """Corpora, tokenised, as batches for span corruption.

    Attributes:
        vocabulary: given or trained.
        corpora: names of those that could be had, in the config's order.
        fingerprint: changes with the vocabulary, the corpora or their text; together with the config it
            decides what every batch holds, so an iterator's state is good only where it is the same.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        documents: Mapping[str, Mapping[str, TokenizedDocuments]],
    ) -> None:
        """See `prepare`, which makes `documents[corpus][split]`.

        Raises:
            UserError: if the lengths, the noise and the sentinels of `config` do not fit each other, or
                a corpus has no text to train on.
        """
        self.vocabulary = vocabulary
        self.corpora = tuple(documents)
        self.fingerprint = _fingerprint(vocabulary, documents)
        self._config = config
        self._documents = documents
        first_sentinel = vocabulary.size - 1
        self._corruption = SpanCorruption(config.noise_density, config.mean_span_length, first_sentinel)
        self._max_tokens = self._corruption.max_tokens(config.encoder_length, config.decoder_length)
        _, spans = self._corruption.num_noise(np.array(self._max_tokens))
        if spans > vocabulary.num_sentinels:
            raise UserError(
                f"data.num_sentinels={vocabulary.num_sentinels} is too few: "
                f"a chunk of {self._max_tokens} tokens has {spans} spans"
            )
        self._chunks = cache(self._make_chunks)
        self._rows = cache(self._make_rows)
        for corpus in self.corpora:
            if not len(self._rows(corpus, "train", config.seed)):
                raise UserError(f"corpus {corpus} has no document that is long enough to train on")

    @classmethod
    def prepare(cls, config: DataConfig) -> "TextData":
        """Fetches, tokenises and opens the corpora; what is on disk already is not made again.

        Processes that prepare the same directory at the same time wait for one another; one that is
        killed leaves nothing behind that could be taken for complete.

        Raises:
            UserError: if no corpus can be had, the directory cannot be written, the vocabulary cannot be
                read or trained, a record is corrupt, or the config contradicts itself.
        """
        directory = data_directory(config.directory)
        try:
            with exclusive(directory):
                corpora = open_datasets(config.corpora, directory, config.text_feature)
                vocabulary = _vocabulary(config, corpora, directory)
                documents = {
                    name: {split: tokenize(dataset, split, vocabulary, directory) for split in SPLITS}
                    for name, dataset in corpora.items()
                }
        except OSError as error:
            raise UserError(f"cannot prepare data in {directory}: {error}") from None
        return cls(config, vocabulary, documents)

    def train_batches(self, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Endless training batches; every epoch of a corpus has another order and other spans.

        Row r of global batch b is the same however many processes there are, and each computes only its
        own: process i has rows [i * B / n, (i + 1) * B / n). The iterator's `get_state()` is small and
        JSON-able; `set_state()` continues with the very next batch.

        Raises:
            UserError: if the global batch cannot be divided over the processes.
        """
        config = self._config
        corpora = [
            grain.MapDataset.source(self._row_source(corpus, "train", config.seed))
            .shuffle(seed=_seed(config.seed, "shuffle", corpus))
            .repeat()
            for corpus in self.corpora
        ]
        rows = grain.MapDataset.mix(corpora, self._rates()).random_map(
            self._corrupt_row, seed=_seed(config.seed, "corrupt")
        )
        own = ProcessRows(rows, config.batch_size, process_index, process_count)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        return iter(grain.MapDataset.source(own).batch(own.num_rows).to_iter_dataset(options))

    def evaluation_batches(
        self, corpus: str, split: str, limit: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """One pass over a split, the same whatever the seed of the training is.

        Rows come in random order, so that the first few batches are a fair sample.

        Args:
            corpus: one of `corpora`.
            split: `train`, `validation` or `test`.
            limit: largest number of batches; 0 is all.
            process_index: as in `train_batches`.
            process_count: as in `train_batches`.

        Yields:
            Batches of full shape; the last one is filled up with empty rows, whose segments are 0.

        Raises:
            UserError: for an unknown corpus or split, or a batch that cannot be divided.
        """
        check_choice("corpus", corpus, self.corpora)
        check_choice("split", split, SPLITS)
        source = self._row_source(corpus, split, seed=0)
        rows = grain.MapDataset.source(source).random_map(self._corrupt_row, seed=_seed(0, "corrupt", corpus))
        own = ProcessRows(rows, self._config.batch_size, process_index, process_count)
        num_batches = -(-len(source) // self._config.batch_size)
        return self._evaluation_batches(own, len(source), min(num_batches, limit or num_batches))

    def _evaluation_batches(self, own: ProcessRows, num_rows: int, num_batches: int) -> Iterator[Batch]:
        empty = self._fill([])
        for batch in range(num_batches):
            indices = map(own.global_index, range(batch * own.num_rows, (batch + 1) * own.num_rows))
            rows = [own.rows[index] if index < num_rows else empty for index in indices]
            yield {name: np.stack([row[name] for row in rows]) for name in empty}

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
        return split_into_chunks(self._documents[corpus][split].offsets, self._max_tokens)

    def _make_rows(self, corpus: str, split: str, seed: int) -> Rows:
        lengths = self._chunks(corpus, split).lengths
        if not self._config.pack:
            return one_chunk_a_row(len(lengths))
        rng = np.random.default_rng(_seed(seed, "pack", corpus))
        return pack(lengths, self._corruption, self._config.encoder_length, self._config.decoder_length, rng)

    def _row_source(self, corpus: str, split: str, seed: int) -> RowSource:
        tokens = self._documents[corpus][split].tokens
        return RowSource(tokens, self._chunks(corpus, split), self._rows(corpus, split, seed))

    def _rates(self) -> list[float]:
        """Rows are about equally full, so rates in proportion to rows are so to tokens."""
        if self._config.rates:
            rates = dict(zip(self._config.corpora, self._config.rates, strict=True))
            return [rates[corpus] for corpus in self.corpora]
        return [float(len(self._rows(corpus, "train", self._config.seed))) for corpus in self.corpora]

    def _corrupt_row(self, chunks: list[np.ndarray], rng: np.random.Generator) -> Row:
        return self._fill([self._corruption.corrupt(chunk, rng) for chunk in chunks])

    def _fill(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Row:
        return fill_row(pairs, self._config.encoder_length, self._config.decoder_length)


def _seed(seed: int, *purpose: str) -> int:
    """A 32-bit seed of its own for each purpose."""
    return zlib.crc32(json.dumps([seed, *purpose]).encode())


def _fingerprint(vocabulary: Vocabulary, documents: Mapping[str, Mapping[str, TokenizedDocuments]]) -> str:
    facts: list[object] = [vocabulary.fingerprint, vocabulary.num_sentinels]
    for corpus, splits in documents.items():
        for split, text in splits.items():
            facts.append([corpus, split, text.checksum])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _vocabulary(config: DataConfig, corpora: Mapping[str, Dataset], directory: Path) -> Vocabulary:
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
