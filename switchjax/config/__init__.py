"""Typed, frozen configuration from `ml_collections` files, flags or a saved `config.json`.

A file in `configs/` builds a `Config` and returns `config.to_config_dict()`, so that `--config.section.key=value` can
override any field. `Config.from_dict` turns the result back into checked dataclasses; an unknown key, a wrong type or a
value out of range is a `UserError`. This package imports no jax.
"""

from switchjax.config.cache_dir import user_cache
from switchjax.config.checks import (
    UserError,
    check_choice,
    check_choices,
    check_fraction,
    check_positive,
    check_seed,
    suggest,
)
from switchjax.config.config import OPEN_KEYS, Config, check_key, differences, from_mapping, load_workdir_config
from switchjax.config.data import DataConfig
from switchjax.config.decoding import DecodingConfig
from switchjax.config.layers import KINDS, Layer, LayerKind
from switchjax.config.model import ModelConfig
from switchjax.config.moe import MoEConfig
from switchjax.config.run import EvaluateConfig, InitFromConfig, MeshConfig, OptimizerConfig, TrainConfig

__all__ = [
    "KINDS",
    "OPEN_KEYS",
    "Config",
    "DataConfig",
    "DecodingConfig",
    "EvaluateConfig",
    "InitFromConfig",
    "Layer",
    "LayerKind",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "UserError",
    "check_choice",
    "check_choices",
    "check_fraction",
    "check_key",
    "check_positive",
    "check_seed",
    "differences",
    "from_mapping",
    "load_workdir_config",
    "suggest",
    "user_cache",
]
