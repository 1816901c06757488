"""Typed, frozen configuration, built from `ml_collections` files, flags or a saved `config.json`.

A file in `configs/` builds a `Config` and returns `config.to_config_dict()`, so that
`--config.section.key=value` can override any field; `Config.from_dict` turns the result back into
checked dataclasses. An unknown key, a wrong type or a value out of range is a `UserError`.
This package imports no jax.
"""

from switchjax.config.cache_dir import user_cache
from switchjax.config.checks import UserError, check_choice, check_seed, suggest
from switchjax.config.config import Config, Layer, check_key, differences, load_workdir_config
from switchjax.config.data import DataConfig
from switchjax.config.decoding import DecodingConfig
from switchjax.config.model import ModelConfig
from switchjax.config.moe import MoEConfig
from switchjax.config.run import EvaluateConfig, InitFromConfig, MeshConfig, OptimizerConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "DecodingConfig",
    "EvaluateConfig",
    "InitFromConfig",
    "Layer",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "UserError",
    "check_choice",
    "check_key",
    "check_seed",
    "differences",
    "load_workdir_config",
    "suggest",
    "user_cache",
]
