"""The corpora that the project prepares by itself, from packages that carry real text."""

from switchjax.data.sources import books, reference
from switchjax.data.sources.source import Source

__all__ = ["SOURCES", "Source"]

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        books.KJV,
        books.AUSTEN,
        books.MOBY_DICK,
        books.STATE_OF_THE_UNION,
        reference.NEWSGROUPS,
        reference.ANARCHISM,
        reference.PYTHON_DOCS,
        reference.GCIDE,
    )
}
