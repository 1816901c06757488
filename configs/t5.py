"""T5 1.0 (Raffel et al. 2020): the dense models that the Switch Transformer is measured against.

python scripts/train.py --config=configs/t5.py:base --workdir=runs/t5_base

Sizes: base, large, and xxl in the 1.1 form (geglu, untied) that the Switch paper takes; runlocal for a small machine.
"""

from ml_collections import ConfigDict

from switchjax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    check_choice,
)

_SIZES = {
    "base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_encoder_layers": 12, "num_decoder_layers": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_encoder_layers": 24, "num_decoder_layers": 24},
    "xxl": {
        "d_model": 4096,
        "d_ff": 10240,
        "num_heads": 64,
        "num_encoder_layers": 24,
        "num_decoder_layers": 24,
        "activation": "geglu",
        "tie_embeddings": False,
    },
}


def get_config(arg: str = "base") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/t5.py", arg, [*_SIZES, "runlocal"])
    if arg == "runlocal":
        return _runlocal().to_config_dict()
    return Config(
        model=ModelConfig(**_SIZES[arg], pattern=("dense",), dtype="bfloat16"),
        data=DataConfig(
            vocabulary_size=32000, num_sentinels=100, batch_size=2048, encoder_length=512, decoder_length=114
        ),
        train=TrainConfig(steps=524_288),
    ).to_config_dict()


def _runlocal() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=1024,
            d_model=64,
            d_ff=128,
            num_heads=2,
            d_head=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            pattern=("dense",),
        ),
        mesh=MeshConfig(emulated_devices=8),
        data=DataConfig(
            corpora=("kjv",), vocabulary_size=900, num_sentinels=24, batch_size=8, encoder_length=64, decoder_length=32
        ),
        optimizer=OptimizerConfig(warmup_steps=100),
        train=TrainConfig(steps=2, log_every=1),
        evaluate=EvaluateConfig(batches=1),
    )
