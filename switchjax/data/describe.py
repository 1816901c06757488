"""Describes prepared data in text: tables of sizes, and an example."""

from collections.abc import Sequence

from switchjax.data.images import ImageData
from switchjax.data.splits import SPLITS
from switchjax.data.text import SplitStatistics, TextData

_SHADES = " .:-=+*#%@"


def describe(data: TextData | ImageData) -> str:
    """A table of the corpora's sizes, and an example."""
    if isinstance(data, ImageData):
        return f"{_images_table(data)}\n{_image_example(data)}"
    return f"{_statistics_table(data.statistics())}\n{_text_example(data)}"


def _statistics_table(statistics: Sequence[SplitStatistics]) -> str:
    """One line for each split of each corpus, and one for the totals."""
    columns = ("documents", "bytes", "tokens", "chunks", "rows", "dropped_chunks", "dropped_tokens")
    lines = [["corpus", "split", *columns]]
    for entry in statistics:
        lines.append([entry.corpus, entry.split, *(f"{getattr(entry, column):,}" for column in columns)])
    totals = (sum(getattr(entry, column) for entry in statistics) for column in columns)
    lines.append(["all", "", *(f"{total:,}" for total in totals)])
    return _table(lines)


def _text_example(data: TextData) -> str:
    """The encoder's inputs (if any) and the decoder's targets in the first segment of a validation row."""
    batch = next(data.evaluation_batches(data.corpora[0], "validation", limit=1))
    sections = [f"\n{data.corpora[0]}"]
    for title, tokens, stack in (("inputs", "encoder_tokens", "encoder"), ("targets", "decoder_targets", "decoder")):
        if tokens in batch:
            first_segment = batch[tokens][0][batch[f"{stack}_segments"][0] == 1]
            sections.append(f"{title}:\n{data.vocabulary.decode(first_segment)}")
    return "\n\n".join(sections)


def _images_table(data: ImageData) -> str:
    """One line for each split of each corpus: the number of images, in all and per class."""
    lines = [["corpus", "split", "images", *data.classes]]
    for corpus in data.corpora:
        for split in SPLITS:
            counts = data.class_counts(corpus, split)
            lines.append([corpus, split, *(f"{count:,}" for count in (counts.sum(), *counts))])
    return _table(lines)


def _image_example(data: ImageData) -> str:
    """A validation image in characters; each shows the mean of the channels, and two in a row are about square."""
    batch = next(data.evaluation_batches(data.corpora[0], "validation", limit=1))
    levels = batch["images"][0].mean(-1) * len(_SHADES) // 256
    picture = "\n".join("".join(2 * _SHADES[int(level)] for level in line).rstrip() for line in levels)
    return f"\n{data.corpora[0]}, {data.classes[batch['labels'][0]]}:\n{picture}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first two to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
