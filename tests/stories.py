"""A small corpus of our own, prepared without the network."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from switchjax.config import DataConfig
from switchjax.data import packages
from switchjax.data.packages import Package
from switchjax.data.sources import SOURCES, TextSource

WORDS = re.findall(
    r"\w+",
    "the keeper of the lighthouse counted every ship that passed before dawn and wrote its name in a long grey book "
    "while rain ran down the glass and gulls slept on the rail then he climbed the stair trimmed the lamp and waited",
)


def story(seed: int) -> str:
    """Some hundred words of nonsense in English."""
    rng = np.random.default_rng(seed)
    sentences = (" ".join(rng.choice(WORDS, 9)).capitalize() + "." for _ in range(int(rng.integers(1, 25))))
    return f"Story {seed}.\n" + " ".join(sentences)


def stories(members: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    first = int(members["first"])
    return ((f"story-{seed}", story(seed)) for seed in range(first, first + 150))


def small_source(name: str, first: int, version: str = "1.0.0") -> TextSource:
    return TextSource(name, version, "nonsense", "none", Package("own", str(first)), "first", stories)


@pytest.fixture(scope="session")
def sources() -> Iterator[dict[str, TextSource]]:
    """`tales` and `yarns` can be had; `lost` cannot."""

    def fetch(name: str, folder: Path) -> Path:
        if name == "-1":
            raise packages.SourceUnavailable("it is lost")
        (folder / "first.own").write_text(name)
        return folder / "first.own"

    def read(archive: Path, pattern: object) -> list[tuple[str, bytes]]:
        return [("first", archive.read_bytes())]

    with pytest.MonkeyPatch.context() as patch:
        small = {name: small_source(name, first) for name, first in {"tales": 0, "yarns": 1000, "lost": -1}.items()}
        for name, source in small.items():
            patch.setitem(SOURCES, name, source)
        patch.setitem(packages._FETCHERS, "own", fetch)
        patch.setitem(packages._READERS, ".own", read)
        yield small


@pytest.fixture(scope="session")
def data_config(sources: dict[str, TextSource], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        corpora=("tales", "yarns"),
        directory=str(tmp_path_factory.mktemp("data")),
        vocabulary_size=330,
        num_sentinels=16,
        batch_size=8,
        encoder_length=96,
        decoder_length=32,
    )
