"""The corpora that the project prepares itself, from packages that contain real text or images."""

from switchjax.data.sources import books, images, reference
from switchjax.data.sources.source import ImageSource, LabelledImages, PackagedSource, TextSource

__all__ = ["SOURCES", "ImageSource", "LabelledImages", "PackagedSource", "TextSource"]

SOURCES: dict[str, PackagedSource] = {
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
        images.FASHION_MNIST,
    )
}
