"""A small Switch Transformer on 8 devices in each layout of the paper's section 5 and in FSDP: docs/layouts.md.

python scripts/train.py --config=configs/layouts.py:fsdp --workdir=runs/layouts/fsdp
python scripts/benchmark.py layouts --write docs/layouts.md --picture docs/layouts.svg

Sizes: data, model, model-data, expert-data, expert-model-data, fsdp; runlocal.

Layouts differ only in the section `mesh`.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES: dict[str, dict[str, Any]] = {
    "data": {"data": 8},
    "model": {"data": 1, "model": 8},
    "model-data": {"data": 4, "model": 2},
    "expert-data": {"data": 1, "expert": 8},
    "expert-model-data": {"data": 2, "expert": 2, "model": 2},
    "fsdp": {"data": 8, "sharded": "parameters"},
}


def get_config(arg: str = "data") -> ConfigDict:
    """The config of a layout."""
    check_choice("configs/layouts.py", arg, [*SIZES, "runlocal"])
    config = Config(
        model=ModelConfig(
            family="decoder_only",
            positions="rotary",
            pattern=("dense", "moe"),
            dtype="float32",
            vocab_size=1024,
            d_model=64,
            d_ff=128,
            num_heads=8,
            d_head=8,
            num_decoder_layers=4,
        ),
        moe=MoEConfig(num_experts=8, group_size=128, jitter_noise=0.0),
        data=DataConfig(objective="causal", vocabulary_size=1000, num_sentinels=0, batch_size=16, decoder_length=128),
        mesh=MeshConfig(**SIZES["fsdp" if arg == "runlocal" else arg], emulated_devices=8),
        train=TrainConfig(steps=1000),
    )
    small = dataclasses.replace(runlocal(config), mesh=config.mesh)
    return (small if arg == "runlocal" else config).to_config_dict()
