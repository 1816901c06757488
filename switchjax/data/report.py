"""What prepared data looks like, for people."""

from collections.abc import Sequence

from switchjax.data.pipeline import SplitStatistics, TextData


def statistics_table(statistics: Sequence[SplitStatistics]) -> str:
    """A line for each split of each corpus, and one for all."""
    columns = ("documents", "bytes", "tokens", "chunks", "rows", "dropped_chunks", "dropped_tokens")
    lines = [["corpus", "split", *columns]]
    for entry in statistics:
        lines.append([entry.corpus, entry.split, *(f"{getattr(entry, column):,}" for column in columns)])
    totals = (sum(getattr(entry, column) for entry in statistics) for column in columns)
    lines.append(["all", "", *(f"{total:,}" for total in totals)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def corrupted_example(data: TextData) -> str:
    """Inputs and targets of one validation text."""
    batch = next(data.evaluation_batches(data.corpora[0], "validation", limit=1))
    inputs = data.vocabulary.decode(batch["encoder_tokens"][0])
    targets = data.vocabulary.decode(batch["decoder_targets"][0])
    return f"\n{data.corpora[0]}, inputs:\n{inputs}\n\ntargets:\n{targets}"
