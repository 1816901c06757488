"""From the section `data` of a config to its data."""

from switchjax.config import DataConfig
from switchjax.data.images import ImageData
from switchjax.data.text import TextData


def prepare_data(config: DataConfig) -> TextData | ImageData:
    """Fetches and opens the corpora: images for `data.objective=classification`, otherwise text.

    Raises:
        UserError: as `TextData.prepare` and `ImageData.prepare` do; a corpus of the other kind is refused by name.
    """
    return ImageData.prepare(config) if config.objective == "classification" else TextData.prepare(config)
