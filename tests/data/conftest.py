"""The small corpora, prepared once, and what holds of batches of any kind."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from switchjax.config import DataConfig
from switchjax.data.data import Data
from switchjax.data.datasets import TextDataset, open_datasets
from switchjax.data.directory import exclusive
from switchjax.data.rows import HostBatch
from switchjax.data.text import TextData
from tests.data import pictures


@pytest.fixture(scope="session")
def config(data_config: DataConfig) -> DataConfig:
    return data_config


@pytest.fixture(scope="session")
def data(config: DataConfig) -> TextData:
    return TextData.prepare(config)


@pytest.fixture(scope="session")
def prepared(data: TextData, config: DataConfig) -> dict[str, TextDataset]:
    directory = Path(config.directory)
    with exclusive(directory):
        opened = open_datasets(config.corpora, directory)
    return {name: TextDataset.of(dataset, "text") for name, dataset in opened.items()}


@pytest.fixture(scope="session")
def image_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataConfig]:
    with pytest.MonkeyPatch.context() as patch:
        pictures.install(patch)
        directory = str(tmp_path_factory.mktemp("images"))
        yield DataConfig("classification", ("doodles",), directory=directory, batch_size=8)


def padded(config: DataConfig, **changes: object) -> DataConfig:
    return dataclasses.replace(config, pack=False, **changes)


def take(batches: Iterable[HostBatch], count: int) -> list[HostBatch]:
    return list(itertools.islice(batches, count))


def assert_same(first: list[HostBatch], second: list[HostBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def divided(processes: int, batch_size: int = 8) -> list[range]:
    """The rows of each process, first to last."""
    share = batch_size // processes
    return [range(start, start + share) for start in range(0, batch_size, share)]


def joined(shares: Sequence[Sequence[HostBatch]]) -> list[HostBatch]:
    """Batches of the processes as one."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


def assert_resumes(data: Data) -> None:
    """A fresh iterator goes on exactly where another one was, in the middle of an epoch and after it."""
    batches = data.train_batches()
    for consumed in (0, 1, 7, 40):
        take(batches, consumed)
        state = json.loads(json.dumps(batches.get_state()))
        expected = take(batches, 5)
        fresh = data.train_batches()
        take(fresh, 3)
        fresh.set_state(state)
        assert_same(take(fresh, 5), expected)
        # The state of a resumed iterator is that of the one that never stopped.
        assert fresh.get_state() == batches.get_state()
