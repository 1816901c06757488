"""The small corpora, prepared once."""

import dataclasses
from pathlib import Path

import pytest

from switchjax.config import DataConfig
from switchjax.data import datasets
from switchjax.data.directory import exclusive
from switchjax.data.pipeline import TextData


@pytest.fixture(scope="session")
def config(data_config: DataConfig) -> DataConfig:
    return data_config


@pytest.fixture(scope="session")
def data(config: DataConfig) -> TextData:
    return TextData.prepare(config)


@pytest.fixture(scope="session")
def prepared(data: TextData, config: DataConfig) -> dict[str, datasets.Dataset]:
    directory = Path(config.directory)
    with exclusive(directory):
        return datasets.open_datasets(config.corpora, directory, "text")


def padded(config: DataConfig, **changes: object) -> DataConfig:
    return dataclasses.replace(config, pack=False, **changes)
