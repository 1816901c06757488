"""What a source is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from switchjax.data.packages import Package

Documents = Iterator[tuple[str, str]]
"""(document id, text) pairs; ids are unique, text is plain, one paragraph a line."""


@dataclass(frozen=True)
class Source:
    """A corpus that is read out of one package.

    Attributes:
        name: the corpus' name in `data.corpora`.
        version: raised whenever the package or `documents` changes, so that prepared data is made again.
        description: one line.
        license: of the text.
        package: where it comes from.
        members: regular expression for the archive members that hold the text.
        documents: from those members (name -> content, sorted by name) to documents.
    """

    name: str
    version: str
    description: str
    license: str
    package: Package
    members: str
    documents: Callable[[Mapping[str, bytes]], Documents]
