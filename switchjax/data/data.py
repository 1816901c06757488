"""What text and images share: training and evaluation batches drawn from corpora."""

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

    Row r of global batch b does not depend on the number of processes. Each process computes only the rows that its
    devices hold (`process_rows`).

    Attributes:
        corpora: names of the available corpora, in the config's order.
        fingerprint: changes with the vocabulary, the corpora or their content. Fingerprint and config together
            determine every batch, so an iterator's state is valid only for the same fingerprint.
        vocabulary: None for images.
    """

    vocabulary: Vocabulary | None

    def __init__(self, config: DataConfig, corpora: tuple[str, ...], fingerprint: str) -> None:
        self.corpora = corpora
        self.fingerprint = fingerprint
        self._config = config.only(corpora)

    def train_batches(self, own: Sequence[int] | None = None) -> grain.DatasetIterator[HostBatch]:
        """Endless training batches; each epoch of a corpus has a new order and new random spans or crops.

        The iterator's `get_state()` is small and can be written as JSON. `set_state()` continues with the next batch,
        also in an iterator over other rows.

        Args:
            own: which rows of each global batch to compute, in this order; default: all.
        """
        config = self._config
        sources = {corpus: self._train_source(corpus) for corpus in self.corpora}
        corpora = [
            grain.MapDataset.source(source).shuffle(seed=derived_seed(config.seed, "shuffle", corpus)).repeat()
            for corpus, source in sources.items()
        ]
        # "corrupt" is part of the seed: another word would make earlier runs unrepeatable.
        rows = grain.MapDataset.mix(corpora, self._rates(sources)).random_map(
            self._train_row, seed=derived_seed(config.seed, "corrupt")
        )
        part = ProcessRows(rows, config.batch_size, own)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        return iter(grain.MapDataset.source(part).batch(part.num_rows).to_iter_dataset(options))

    def evaluation_batches(
        self, corpus: str, split: str, limit: int = 0, own: Sequence[int] | None = None
    ) -> Iterator[HostBatch]:
        """One pass over a split; it does not depend on the training seed.

        Rows come in random order, so the first few batches are a fair sample.

        Args:
            corpus: one of `corpora`.
            split: `train`, `validation` or `test`.
            limit: largest number of batches; 0 means all.
            own: as in `train_batches`.

        Yields:
            Batches of full shape; empty rows (segments 0, or label -1) fill the last one.

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
        """The configured rates; without any, each corpus counts by its rows, which are about equally full of tokens."""
        return list(self._config.rates) or [float(len(source)) for source in sources.values()]

    def _check_trainable(self) -> None:
        for corpus in self.corpora:
            if not len(self._train_source(corpus)):
                raise UserError(f"corpus {corpus} holds nothing to train on: its data are empty or too short")

    @abc.abstractmethod
    def _train_source(self, corpus: str) -> grain.sources.RandomAccessDataSource[Any]:
        """The items that training rows are made from."""

    @abc.abstractmethod
    def _train_row(self, item: Any, rng: np.random.Generator) -> Row:
        """Makes a row from an item of `_train_source`."""

    @abc.abstractmethod
    def _evaluation_rows(self, corpus: str, split: str) -> grain.MapDataset[Row]:
        """The rows of a split."""

    @abc.abstractmethod
    def _empty_row(self) -> Row:
        """A row of padding, which no loss or metric counts."""


def derived_seed(seed: int, *purpose: str) -> int:
    """A 32-bit seed, different for each purpose."""
    return zlib.crc32(json.dumps([seed, *purpose]).encode())


def fingerprint(facts: Sequence[object]) -> str:
    """A short digest of facts that can be written as JSON."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
