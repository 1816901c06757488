"""Vision Transformer (Dosovitskiy et al. 2020), with V-MoE's sizes and training on JFT-300M (Riquelme et al. 2021).

python scripts/train.py --config=configs/vit.py:s-32 --workdir=runs/vit_s_32

Sizes: s-32, b-32, b-16, l-32, l-16, h-14 (the number is the side of a patch in pixels); runlocal for a small machine.

JFT-300M is not public: the model has its 18,291 classes, but the images are those of `data.corpora`. The loss is a
softmax cross-entropy instead of the paper's sigmoid loss. S has 8 layers, unlike the later ViT-S.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_S = {"num_encoder_layers": 8, "d_model": 512, "d_ff": 2048, "num_heads": 8}
_B = {"num_encoder_layers": 12, "d_model": 768, "d_ff": 3072, "num_heads": 12}
_L = {"num_encoder_layers": 24, "d_model": 1024, "d_ff": 4096, "num_heads": 16}
_H = {"num_encoder_layers": 32, "d_model": 1280, "d_ff": 5120, "num_heads": 16, "d_head": 80}

SIZES = {
    "s-32": (_S, 32, 1e-3),
    "b-32": (_B, 32, 8e-4),
    "b-16": (_B, 16, 8e-4),
    "l-32": (_L, 32, 6e-4),
    "l-16": (_L, 16, 4e-4),
    "h-14": (_H, 14, 3e-4),
}
"""Name -> the model, patch size, learning rate."""


def get_config(arg: str = "s-32") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/vit.py", arg, [*SIZES, "runlocal"])
    model, patch_size, learning_rate = SIZES.get(arg, SIZES["s-32"])
    config = Config(
        model=ModelConfig(
            **model,
            family="vision",
            patch_size=patch_size,
            num_classes=18_291,
            pre_logits=True,
            pattern=("dense",),
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            scale_scores=True,
            embedding_stddev=0.02,
            dtype="bfloat16",
        ),
        data=DataConfig(objective="classification", corpora=("imagenet2012",), batch_size=4096),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="linear",
            b2=0.999,
            weight_decay=0.1,
            clip_norm=10.0 if arg == "h-14" else 0.0,
        ),
        train=TrainConfig(steps=520_000),  # 7 epochs of JFT
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
