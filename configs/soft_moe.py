"""Soft MoE (Puigcerver et al. 2023): Vision Transformers whose second half has experts that mix all tokens of an image.

python scripts/train.py --config=configs/soft_moe.py:s-16-128e --workdir=runs/soft_moe

Sizes: s-16-128e, s-14-256e, b-16-128e, l-16-128e, h-14-128e, h-14-256e (patches of so many pixels a side, experts a
layer); runlocal for a small machine.

Each expert has one slot an image: `moe.options.slots_per_expert` has others. JFT-4B is not public: the classes are its
29,593, the images those of `data.corpora`. The released model pools the tokens and normalises queries and keys; here a
class token is classified, as in V-MoE. Its loss, one sigmoid a class, is a softmax here.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_S = {"num_encoder_layers": 12, "d_model": 384, "d_ff": 1536, "num_heads": 6}
_B = {"num_encoder_layers": 12, "d_model": 768, "d_ff": 3072, "num_heads": 12}
_L = {"num_encoder_layers": 24, "d_model": 1024, "d_ff": 4096, "num_heads": 16}
_H = {"num_encoder_layers": 32, "d_model": 1280, "d_ff": 5120, "num_heads": 16, "d_head": 80}

SIZES = {
    "s-16-128e": (_S, 16, 128),
    "s-14-256e": (_S, 14, 256),
    "b-16-128e": (_B, 16, 128),
    "l-16-128e": (_L, 16, 128),
    "h-14-128e": (_H, 14, 128),
    "h-14-256e": (_H, 14, 256),
}
"""Name -> the model, patch size, experts."""


def get_config(arg: str = "s-16-128e") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/soft_moe.py", arg, [*SIZES, "runlocal"])
    model, patch_size, experts = SIZES.get(arg, SIZES["s-16-128e"])
    half = model["num_encoder_layers"] // 2
    config = Config(
        model=ModelConfig(
            **model,
            family="vision",
            patch_size=patch_size,
            num_classes=29_593,
            pattern=("dense",) * half + ("soft",) * half,
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            scale_scores=True,
            embedding_stddev=0.02,
            dtype="bfloat16",
        ),
        moe=MoEConfig(num_experts=experts, options={"slots_per_expert": 1}),
        data=DataConfig(objective="classification", corpora=("imagenet2012",), batch_size=4096),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-3, warmup_steps=10_000, b2=0.999, weight_decay=0.03, clip_norm=1.0
        ),
        train=TrainConfig(steps=2_000_000 if arg.startswith("h") else 4_000_000),
    )
    if arg == "runlocal":
        config = runlocal(config, {"pattern": ("dense", "soft")}, {"options": {"slots_per_expert": 2}})
    return config.to_config_dict()
