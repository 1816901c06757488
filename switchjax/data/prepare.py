"""Prepares the data that the section `data` of a config describes."""

from switchjax.config import DataConfig, UserError
from switchjax.data.images import ImageData
from switchjax.data.text import TextData
from switchjax.parallel.processes import all_values, first_then_others


def prepare_data(config: DataConfig) -> TextData | ImageData:
    """Fetches and opens the corpora: images for `data.objective=classification`, otherwise text.

    If several processes share a disk, the first prepares it while the others wait; otherwise each prepares its own.

    Raises:
        UserError: as in `TextData.prepare` and `ImageData.prepare`; also if a corpus is of the other kind, or if
            processes end up with different data, for instance because one of them cannot fetch a corpus.
    """

    def prepare() -> TextData | ImageData:
        return ImageData.prepare(config) if config.objective == "classification" else TextData.prepare(config)

    data = first_then_others(prepare)
    first, *others = all_values(f"{', '.join(data.corpora)} ({data.fingerprint})")
    for index, other in enumerate(others, 1):
        if other != first:
            raise UserError(f"processes prepared different data: process 0 has {first}, process {index} has {other}")
    return data
