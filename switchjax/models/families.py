"""The families of models, by the names that `model.family` takes."""

from jaxtyping import PRNGKeyArray

from switchjax.config import Config
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.language_model import LanguageModel
from switchjax.models.model import Model
from switchjax.models.vision import VisionTransformer
from switchjax.parallel.sharding import mark_sharded

FAMILIES: dict[str, type[Model]] = {
    "encoder_decoder": EncoderDecoder,
    "decoder_only": LanguageModel,
    "recurrent": LanguageModel,
    "vision": VisionTransformer,
}

TextModel = EncoderDecoder | LanguageModel
"""Models that write: `start` gives the cache of a batch, `extend` reads further tokens into it."""


def build(config: Config, key: PRNGKeyArray) -> Model:
    """The model that `config.model.family` names, freshly initialised."""
    return mark_sharded(FAMILIES[config.model.family](config, key), config.mesh.sharded)
