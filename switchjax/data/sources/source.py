"""The description of a source: a corpus that is read from a package."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from switchjax.data.packages import Package

Documents = Iterator[tuple[str, str]]
"""(document id, text) pairs; ids are unique, text is plain with one paragraph per line."""


class LabelledImages(NamedTuple):
    """Images and the class of each."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Integer[np.ndarray, "N"]


@dataclass(frozen=True)
class PackagedSource:
    """A corpus that is read from one package.

    Attributes:
        name: the corpus's name in `data.corpora`.
        version: raise it whenever the package or its reader changes, so that data is prepared again.
        description: one line.
        license: license of the content.
        package: the package that contains the corpus.
        members: regular expression that selects the archive's files with the content.
    """

    name: str
    version: str
    description: str
    license: str
    package: Package
    members: str


@dataclass(frozen=True)
class TextSource(PackagedSource):
    """A corpus of text.

    Attributes:
        documents: reads documents from the selected files (name -> content, sorted by name).
    """

    documents: Callable[[Mapping[str, bytes]], Documents]


@dataclass(frozen=True)
class ImageSource(PackagedSource):
    """A corpus of images.

    Attributes:
        splits: reads the corpus's own splits from the selected files.
        classes: names of the labels 0, 1, ...
    """

    splits: Callable[[Mapping[str, bytes]], Mapping[str, LabelledImages]]
    classes: tuple[str, ...]
