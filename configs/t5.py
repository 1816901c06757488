"""T5 (Raffel et al. 2020): the dense baselines of the Switch Transformer.

python scripts/train.py --config=configs/t5.py:base --workdir=runs/t5_base

Sizes: base, large; xxl in the form of version 1.1 (geglu, untied) that the Switch paper uses; v1_1-base, v1_1-large,
v1_1-xl, v1_1-xxl; runlocal for a small machine.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_LAYERS_12 = {"num_encoder_layers": 12, "num_decoder_layers": 12}
_LAYERS_24 = {"num_encoder_layers": 24, "num_decoder_layers": 24}
_V1_1 = {"activation": "geglu", "tie_embeddings": False}
_XXL = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, **_LAYERS_24, **_V1_1}

SIZES = {
    "base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, **_LAYERS_12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, **_LAYERS_24},
    "xxl": _XXL,
    "v1_1-base": {"d_model": 768, "d_ff": 2048, "num_heads": 12, **_LAYERS_12, **_V1_1},
    "v1_1-large": {"d_model": 1024, "d_ff": 2816, "num_heads": 16, **_LAYERS_24, **_V1_1},
    "v1_1-xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, **_LAYERS_24, **_V1_1},
    "v1_1-xxl": _XXL,
}


def get_config(arg: str = "base") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/t5.py", arg, [*SIZES, "runlocal"])
    config = Config(
        model=ModelConfig(**SIZES.get(arg, SIZES["base"]), pattern=("dense",), dtype="bfloat16"),
        data=DataConfig(
            vocabulary_size=32000, num_sentinels=100, batch_size=2048, encoder_length=512, decoder_length=114
        ),
        train=TrainConfig(steps=524_288),
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
