"""V-MoE (Riquelme et al. 2021): Vision Transformers with 32 experts in all second blocks, or in the last few of these.

python scripts/train.py --config=configs/vmoe.py:s-32-every2 --workdir=runs/vmoe_s_32

Sizes: s-32-every2, s-32-last2, b-32-every2, b-32-last2, b-16-every2, b-16-last2, l-32-every2, l-32-last2, l-16-every2,
l-16-last2, h-14-every2, h-14-last5, 15b; runlocal for a small machine.

With batch-prioritised routing, evaluation needs less capacity:
--config.moe.fill_order=batch_prioritized --config.moe.eval_capacity_factor=0.5
JFT-300M is not public: the model has its 18,291 classes, but the images are those of `data.corpora`. The loss is a
softmax cross-entropy instead of the paper's sigmoid loss.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_S = {"num_encoder_layers": 8, "d_model": 512, "d_ff": 2048, "num_heads": 8}
_B = {"num_encoder_layers": 12, "d_model": 768, "d_ff": 3072, "num_heads": 12}
_L = {"num_encoder_layers": 24, "d_model": 1024, "d_ff": 4096, "num_heads": 16}
_H = {"num_encoder_layers": 32, "d_model": 1280, "d_ff": 5120, "num_heads": 16, "d_head": 80}
_15B = {"num_encoder_layers": 48, "d_model": 1408, "d_ff": 6400, "num_heads": 16, "d_head": 88}
_VIT = {
    "s-32": (_S, 32, 1e-3),
    "b-32": (_B, 32, 8e-4),
    "b-16": (_B, 16, 8e-4),
    "l-32": (_L, 32, 6e-4),
    "l-16": (_L, 16, 4e-4),
    "h-14": (_H, 14, 3e-4),
}

SIZES = {
    **{f"{name}-every2": (*vit, 0) for name, vit in _VIT.items()},
    **{f"{name}-last2": (*vit, 2) for name, vit in _VIT.items() if name != "h-14"},
    "h-14-last5": (*_VIT["h-14"], 5),
    "15b": (_15B, 14, 3e-4, 0),
}
"""Name -> the model, patch size, learning rate, how many second blocks have experts, counted from the end (0: all)."""


def get_config(arg: str = "s-32-every2") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/vmoe.py", arg, [*SIZES, "runlocal"])
    model, patch_size, learning_rate, last = SIZES.get(arg, SIZES["s-32-every2"])
    tokens = (224 // patch_size) ** 2 + 1
    config = Config(
        model=ModelConfig(
            **model,
            family="vision",
            patch_size=patch_size,
            num_classes=18_291,
            pre_logits=True,
            pattern=_pattern(model["num_encoder_layers"], last),
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            scale_scores=True,
            embedding_stddev=0.02,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            router="v_moe",
            num_experts=32,
            num_selected_experts=2,
            group_size=8 * tokens,
            train_capacity_factor=1.05,
            eval_capacity_factor=1.05,
            jitter_noise=0.0,
            loss_weights={"load_balance_loss": 0.0, "importance_loss": 0.005, "load_loss": 0.005},
        ),
        data=DataConfig(objective="classification", corpora=("imagenet2012",), batch_size=4096),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="linear",
            b2=0.999,
            weight_decay=0.1,
            clip_norm=10.0 if arg.startswith("h-14") else 0.0,
        ),
        train=TrainConfig(steps=520_000),  # 7 epochs of JFT
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()


def _pattern(layers: int, last: int) -> tuple[str, ...]:
    if not last:
        return ("dense", "moe")
    return ("dense",) * (layers - 2 * last) + ("dense", "moe") * last
