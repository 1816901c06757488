"""What text and images have in common: corpora as batches of rows."""

import abc
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from switchjax.config import DataConfig, UserError, check_choice
from switchjax.data.rows import HostBatch, ProcessRows, Row
from switchjax.data.splits import SPLITS
from switchjax.data.vocabulary import Vocabulary

_PREFETCHED_BATCHES = 4


class Data(abc.ABC):
    """Corpora as training and evaluation batches.

    Row r of global batch b is the same however many processes there are, and each computes only its own: those that its
    devices hold (`process_rows`).

    Attributes:
        corpora: names of those that could be had, in the config's order.
        fingerprint: changes with the vocabulary, the corpora or their content; together with the config it decides what
            every batch holds, so an iterator's state is good only where it is the same.
        vocabulary: None for images.
    """

    vocabulary: Vocabulary | None

    def __init__(self, config: DataConfig, corpora: tuple[str, ...], fingerprint: str) -> None:
        self.corpora = corpora
        self.fingerprint = fingerprint
        self._config = config.only(corpora)

    def train_batches(self, own: Sequence[int] | None = None) -> grain.DatasetIterator[HostBatch]:
        """Endless training batches; every epoch of a corpus has another order and is drawn anew.

        The iterator's `get_state()` is small and JSON-able; `set_state()` continues with the very next batch, whatever
        rows the iterator was for.

        Args:
            own: rows of each global batch that are computed, in this order; all of them by default.
        """
        config = self._config
        sources = {corpus: self._train_source(corpus) for corpus in self.corpora}
        corpora = [
            grain.MapDataset.source(source).shuffle(seed=derived_seed(config.seed, "shuffle", corpus)).repeat()
            for corpus, source in sources.items()
        ]
        # The word is part of the seed: with another one, runs so far could not be repeated.
        rows = grain.MapDataset.mix(corpora, self._rates(sources)).random_map(
            self._train_row, seed=derived_seed(config.seed, "corrupt")
        )
        part = ProcessRows(rows, config.batch_size, own)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        return iter(grain.MapDataset.source(part).batch(part.num_rows).to_iter_dataset(options))

    def evaluation_batches(
        self, corpus: str, split: str, limit: int = 0, own: Sequence[int] | None = None
    ) -> Iterator[HostBatch]:
        """One pass over a split, the same whatever the seed of the training is.

        Rows come in random order, so that the first few batches are a fair sample.

        Args:
            corpus: one of `corpora`.
            split: `train`, `validation` or `test`.
            limit: largest number of batches; 0 is all.
            own: as in `train_batches`.

        Yields:
            Batches of full shape; the last one is filled up with empty rows, whose segments are 0 or label -1.

        Raises:
            UserError: for an unknown corpus or split.
        """
        check_choice("corpus", corpus, self.corpora)
        check_choice("split", split, SPLITS)
        rows = self._evaluation_rows(corpus, split)
        part = ProcessRows(rows, self._config.batch_size, own)
        num_batches = -(-len(rows) // self._config.batch_size)
        return self._evaluation_batches(part, min(num_batches, limit or num_batches))

    def _evaluation_batches(self, part: ProcessRows, num_batches: int) -> Iterator[HostBatch]:
        empty = self._empty_row()
        for batch in range(num_batches):
            indices = map(part.global_index, range(batch * part.num_rows, (batch + 1) * part.num_rows))
            rows = [part.rows[index] if index < len(part.rows) else empty for index in indices]
            yield {name: np.stack([row[name] for row in rows]) for name in empty}

    def _rates(self, sources: dict[str, grain.sources.RandomAccessDataSource[Any]]) -> list[float]:
        """As configured; or in proportion to rows, which are about equally full, and so to tokens."""
        return list(self._config.rates) or [float(len(source)) for source in sources.values()]

    def _check_trainable(self) -> None:
        for corpus in self.corpora:
            if not len(self._train_source(corpus)):
                raise UserError(
                    f"corpus {corpus} has nothing that could be trained on: its data are empty or too short"
                )

    @abc.abstractmethod
    def _train_source(self, corpus: str) -> grain.sources.RandomAccessDataSource[Any]:
        """What rows of training are made of."""

    @abc.abstractmethod
    def _train_row(self, item: Any, rng: np.random.Generator) -> Row:
        """A row out of an item of `_train_source`."""

    @abc.abstractmethod
    def _evaluation_rows(self, corpus: str, split: str) -> grain.MapDataset[Row]:
        """The rows of a split."""

    @abc.abstractmethod
    def _empty_row(self) -> Row:
        """A row that counts for nothing."""


def derived_seed(seed: int, *purpose: str) -> int:
    """A 32-bit seed of its own for each purpose."""
    return zlib.crc32(json.dumps([seed, *purpose]).encode())


def fingerprint(facts: Sequence[object]) -> str:
    """A short digest of facts that JSON can write."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
