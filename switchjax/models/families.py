"""The families of models by the values of `model.family`."""

import dataclasses

from jaxtyping import PRNGKeyArray

from switchjax.config import Config, from_mapping
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.language_model import LanguageModel
from switchjax.models.model import Model
from switchjax.models.vision import VisionTransformer
from switchjax.moe.peer import PEEROptions
from switchjax.moe.routers import loss_weights, router_options
from switchjax.moe.soft import SoftMoEOptions
from switchjax.parallel.sharding import mark_sharded

FAMILIES: dict[str, type[Model]] = {
    "encoder_decoder": EncoderDecoder,
    "decoder_only": LanguageModel,
    "recurrent": LanguageModel,
    "vision": VisionTransformer,
}

_OPTIONS = {"peer": PEEROptions, "soft": SoftMoEOptions}
"""Feed-forward layer -> the dataclass of its options; all other layers with experts have a router with options."""

TextModel = EncoderDecoder | LanguageModel
"""Models that decode: `start` returns the cache of a batch, `extend` reads further tokens into it."""


def build(config: Config, key: PRNGKeyArray) -> Model:
    """A newly initialised model of `config.model.family`."""
    config = with_all_options(config)  # so that models of equal configs are equal pytrees
    return mark_sharded(FAMILIES[config.model.family](config, key), config.mesh.sharded)


def with_all_options(config: Config) -> Config:
    """`config` with all values of `moe.options` and `moe.loss_weights`, including defaults.

    Then two configs of the same model are equal, and a saved config holds everything that a run depends on.

    Raises:
        UserError: for an unknown option or loss.
    """
    if not config.model.has_experts:
        return config
    known = next((_OPTIONS[kind.feed_forward] for kind in config.model.kinds if kind.feed_forward in _OPTIONS), None)
    if known is None:
        options, weights = router_options(config.moe), loss_weights(config.moe)
    else:
        options, weights = from_mapping(known, config.moe.options, "moe.options"), {}
    moe = dataclasses.replace(config.moe, options=dataclasses.asdict(options), loss_weights=weights)
    return dataclasses.replace(config, moe=moe)
