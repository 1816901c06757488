"""Switch Transformer (Fedus, Zoph and Shazeer 2021) in the released sizes.

python scripts/train.py --config=configs/switch.py:base-8 --workdir=runs/switch_base_8

Sizes: base-8, base-16, base-32, base-64, base-128, base-256 (experts), large-128, xxl-128, c; runlocal for a small
machine.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_BASE = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_encoder_layers": 12, "num_decoder_layers": 12}
_LARGE = {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_encoder_layers": 24, "num_decoder_layers": 24}
_XXL = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_encoder_layers": 24, "num_decoder_layers": 24}
# The released model has 30 heads; the paper's FLOPs are those of 32. Every layer is an MoE layer.
_C = {"d_model": 2080, "d_ff": 6144, "num_heads": 30, "num_encoder_layers": 15, "num_decoder_layers": 15}

SIZES = {
    **{f"base-{experts}": (_BASE, {"num_experts": experts}) for experts in (8, 16, 32, 64, 128, 256)},
    "large-128": (_LARGE, {"num_experts": 128}),
    # The released model has 128 experts; the paper says 64.
    "xxl-128": (
        _XXL | {"activation": "geglu", "tie_embeddings": False},
        {"num_experts": 128, "eval_capacity_factor": 4.0},
    ),
    "c": (
        _C | {"pattern": ("moe",), "tie_embeddings": False},
        {"num_experts": 2048, "train_capacity_factor": 1.0, "min_expert_capacity": 2},
    ),
}


def get_config(arg: str = "base-8") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/switch.py", arg, [*SIZES, "runlocal"])
    model, moe = SIZES.get(arg, SIZES["base-8"])
    config = Config(
        model=ModelConfig(**{"pattern": ("dense", "moe"), "dtype": "bfloat16"} | model),
        moe=MoEConfig(**{"group_size": 2048} | moe),
        data=DataConfig(
            vocabulary_size=32000, num_sentinels=100, batch_size=2048, encoder_length=512, decoder_length=114
        ),
        train=TrainConfig(steps=524_288),
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
