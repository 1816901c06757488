"""The small form of a published system, which any machine can train."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from switchjax.config.config import Config
from switchjax.config.data import DataConfig
from switchjax.config.model import ModelConfig
from switchjax.config.run import EvaluateConfig, MeshConfig, TrainConfig

_SIZES = {
    "vocab_size": 1024,
    "d_model": 64,
    "d_ff": 128,
    "num_heads": 2,
    "d_head": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dtype": "float32",
}
_TEXT = {"corpora": ("kjv",), "vocabulary_size": 900, "num_sentinels": 24, "encoder_length": 64, "decoder_length": 32}
_IMAGES = {"corpora": ("fashion_mnist",)}


def runlocal(config: Config, model: Mapping[str, Any] | None = None, moe: Mapping[str, Any] | None = None) -> Config:
    """A small form of `config` with the same architecture: two steps on real data, on 8 emulated devices.

    `model` and `moe` hold fields of these sections that need other values than the usual ones here, such as a pattern
    with as many layers as the small stack.
    """
    vision = config.model.family == "vision"
    small = {"image_size": 28, "image_channels": 1, "patch_size": 7, "num_classes": 10} if vision else {}
    sizes: dict[str, Any] = {**_SIZES, **small, **(model or {})}
    smaller = dataclasses.replace(config.model, **sizes)
    experts: dict[str, Any] = {"num_experts": 8, "group_size": _group_size(smaller), **(moe or {})}
    # At least 8 groups in each stack, one for each device.
    rows = 64 if vision else 16
    return dataclasses.replace(
        config,
        model=smaller,
        moe=dataclasses.replace(config.moe, **experts),
        mesh=MeshConfig(expert=4 if smaller.has_experts else 1, emulated_devices=8),
        data=DataConfig(objective=config.data.objective, batch_size=rows, **(_IMAGES if vision else _TEXT)),
        train=TrainConfig(steps=2, log_every=1),
        evaluate=EvaluateConfig(batches=1),
    )


def _group_size(model: ModelConfig) -> int:
    return 8 * (model.num_patches + 1) if model.family == "vision" else 64
