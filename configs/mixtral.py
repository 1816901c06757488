"""Mixtral (Jiang et al. 2024): Mistral's decoder with 8 SwiGLU experts in every layer; each token has two of them.

python scripts/train.py --config=configs/mixtral.py:8x7b --workdir=runs/mixtral_8x7b

Sizes: 8x7b, 8x22b; runlocal for a small machine.

No token is dropped: every expert has room for every token of its group, so groups are short. (On TPUs with all experts
on one device, `moe.dispatch=ragged` avoids the unused room.) The gates are the softmax of the two selected logits. The
training is not published: optimiser, batch and length are ours.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = {
    "8x7b": {"num_decoder_layers": 32, "d_model": 4096, "d_ff": 14_336, "num_heads": 32},
    "8x22b": {"num_decoder_layers": 56, "d_model": 6144, "d_ff": 16_384, "num_heads": 48},
}


def get_config(arg: str = "8x7b") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/mixtral.py", arg, [*SIZES, "runlocal"])
    config = Config(
        model=ModelConfig(
            **SIZES.get(arg, SIZES["8x7b"]),
            family="decoder_only",
            vocab_size=32_000,
            d_head=128,
            num_kv_heads=8,
            pattern=("moe",),
            activation="swiglu",
            positions="rotary",
            rotary_base=1e6,
            scale_scores=True,
            tie_embeddings=False,
            embedding_stddev=0.02,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            router="top_k", num_experts=8, num_selected_experts=2, group_size=512, dropless=True, jitter_noise=0.0
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=32_000, num_sentinels=0, batch_size=1024, decoder_length=4096
        ),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2000, b2=0.95, weight_decay=0.1
        ),
        train=TrainConfig(steps=250_000),
    )
    return (runlocal(config, {"num_kv_heads": 1}) if arg == "runlocal" else config).to_config_dict()
