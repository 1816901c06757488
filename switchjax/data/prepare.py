"""From the section `data` of a config to its data."""

from switchjax.config import DataConfig, UserError
from switchjax.data.images import ImageData
from switchjax.data.text import TextData
from switchjax.parallel.processes import all_values, first_then_others


def prepare_data(config: DataConfig) -> TextData | ImageData:
    """Fetches and opens the corpora: images for `data.objective=classification`, otherwise text.

    Of several processes the first is the one that prepares a disk that they share; on disks of their own, each does.

    Raises:
        UserError: as `TextData.prepare` and `ImageData.prepare` do; a corpus of the other kind is refused by name. Also
            if processes have got different data, as when one of them could not fetch a corpus.
    """

    def prepare() -> TextData | ImageData:
        return ImageData.prepare(config) if config.objective == "classification" else TextData.prepare(config)

    data = first_then_others(prepare)
    first, *others = all_values(f"{', '.join(data.corpora)} ({data.fingerprint})")
    for index, other in enumerate(others, 1):
        if other != first:
            raise UserError(f"process {index} has other data than process 0: {other} instead of {first}")
    return data
