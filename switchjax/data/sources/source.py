"""What a source is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from switchjax.data.packages import Package

Documents = Iterator[tuple[str, str]]
"""(document id, text) pairs; ids are unique, text is plain, one paragraph a line."""


class LabelledImages(NamedTuple):
    """Images and their classes."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Integer[np.ndarray, "N"]


@dataclass(frozen=True)
class PackagedSource:
    """A corpus that is read out of one package.

    Attributes:
        name: the corpus' name in `data.corpora`.
        version: raised whenever the package or its reader changes, so that prepared data is made again.
        description: one line.
        license: of the content.
        package: where it comes from.
        members: regular expression for the archive members that hold the content.
    """

    name: str
    version: str
    description: str
    license: str
    package: Package
    members: str


@dataclass(frozen=True)
class Source(PackagedSource):
    """A corpus of text.

    Attributes:
        documents: from the members (name -> content, sorted by name) to documents.
    """

    documents: Callable[[Mapping[str, bytes]], Documents]


@dataclass(frozen=True)
class ImageSource(PackagedSource):
    """A corpus of images.

    Attributes:
        splits: from the members to the splits that the corpus comes in.
        classes: names of the labels 0, 1, ...
    """

    splits: Callable[[Mapping[str, bytes]], Mapping[str, LabelledImages]]
    classes: tuple[str, ...]
