"""DeepSpeed-MoE (Rajbhandari et al. 2022): top-1 MoE, PR-MoE (a pyramid of residual MoE) and its students, MoS.

python scripts/train.py --config=configs/deepspeed_moe.py:350m --workdir=runs/deepspeed_350m

Sizes: 350m, 1.3b, 6.7b (dense), 350m-moe-128, 1.3b-moe-128, 350m-pr-moe (10 layers of 32 experts, 2 of 64),
1.3b-pr-moe (10 of 64, 2 of 128), 350m-mos (8 of 32, 2 of 64), 1.3b-mos (8 of 64, 2 of 128); runlocal for a small
machine.

A residual MoE layer adds the output of a dense FFN to that of the routed expert; `moe.shared_mixing=learned` weights
the two, as the released code can. A student (MoS) has 21 layers, the last of them dense, and is distilled from a
teacher with 24.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_350M = {"d_model": 1024, "d_ff": 4096, "d_head": 64}
_1_3B = {"d_model": 2048, "d_ff": 8192, "d_head": 128}
_6_7B = {"d_model": 4096, "d_ff": 16_384, "d_head": 128, "num_heads": 32}

SIZES = {
    "350m": (_350M, 24, (), 256, 3e-4),
    "1.3b": (_1_3B, 24, (), 512, 2e-4),
    "6.7b": (_6_7B, 32, (), 1024, 1.2e-4),
    "350m-moe-128": (_350M, 24, (128,) * 12, 256, 2e-4),
    "1.3b-moe-128": (_1_3B, 24, (128,) * 12, 512, 1.2e-4),
    "350m-pr-moe": (_350M, 24, (32,) * 10 + (64,) * 2, 256, 2e-4),
    "1.3b-pr-moe": (_1_3B, 24, (64,) * 10 + (128,) * 2, 512, 1.2e-4),
    "350m-mos": (_350M, 21, (32,) * 8 + (64,) * 2, 256, 2e-4),
    "1.3b-mos": (_1_3B, 21, (64,) * 8 + (128,) * 2, 512, 1.2e-4),
}
"""Name -> the model, layers, experts of each MoE layer, rows per batch, learning rate."""

_LENGTH = 2048
_TOKENS = 300e9


def get_config(arg: str = "350m-pr-moe") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/deepspeed_moe.py", arg, [*SIZES, "runlocal"])
    model, layers, experts, rows, learning_rate = SIZES.get(arg, SIZES["350m-pr-moe"])
    residual = len(set(experts)) > 1
    config = Config(
        model=ModelConfig(
            **{"num_heads": 16} | model,
            family="decoder_only",
            vocab_size=50_304,
            num_decoder_layers=layers,
            pattern=_pattern(layers) if experts else ("dense",),
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            max_length=_LENGTH,
            scale_scores=True,
            scale_logits=False,
            embedding_stddev=0.014,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            num_experts=max(experts, default=1),
            experts_per_layer=experts if residual else (),
            num_shared_experts=1 if residual else 0,
            group_size=_LENGTH,
            train_capacity_factor=1.0,
            eval_capacity_factor=1.0,
            fill_order="random",
            jitter_noise=0.0,
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=50_257, num_sentinels=0, batch_size=rows, decoder_length=_LENGTH
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_steps=round(375e6 / (rows * _LENGTH)),
            clip_norm=1.0,
            b2=0.95,
            weight_decay=0.1,
        ),
        train=TrainConfig(steps=round(_TOKENS / (rows * _LENGTH))),
    )
    if arg == "runlocal":
        pyramid = {"num_decoder_layers": 3, "pattern": ("dense", "moe", "moe")}
        config = runlocal(config, pyramid, {"experts_per_layer": (4, 8)})
    return config.to_config_dict()


def _pattern(layers: int) -> tuple[str, ...]:
    """Experts in every second layer; with an odd number of layers, the last one is dense."""
    return ("dense", "moe") * (layers // 2) + ("dense",) * (layers % 2)
