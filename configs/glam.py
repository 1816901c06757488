"""GLaM (Du et al. 2021): decoders with experts in every other layer; each token has two of them.

python scripts/train.py --config=configs/glam.py:0.1b-64e --workdir=runs/glam_0.1b_64e

Sizes: 0.1b, 1.7b, 8b, 137b (dense), 0.1b-64e, 1.7b-32e, 1.7b-64e, 1.7b-128e, 1.7b-256e, 8b-64e, 64b-64e; runlocal for
a small machine.

A dense layer is a GLU with three matrices; an expert has two matrices. All layers share the relative position bias; in
the paper each layer has its own. The paper's top-2 fills slots with all first choices before any second choice, so a
token's experts depend on later tokens; here earlier tokens come first.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_0_1B = {"num_decoder_layers": 12, "d_model": 768, "d_ff": 3072, "num_heads": 12, "d_head": 64}
_1_7B = {"num_decoder_layers": 24, "d_model": 2048, "d_ff": 8192, "num_heads": 16, "d_head": 128}
_8B = {"num_decoder_layers": 32, "d_model": 4096, "d_ff": 16_384, "num_heads": 32, "d_head": 128}
_64B = {"num_decoder_layers": 64, "d_model": 8192, "d_ff": 32_768, "num_heads": 128, "d_head": 128}

SIZES = {
    "0.1b": (_0_1B, 0),
    "1.7b": (_1_7B, 0),
    "8b": (_8B, 0),
    "137b": (_64B | {"d_ff": 65_536}, 0),
    "0.1b-64e": (_0_1B, 64),
    **{f"1.7b-{experts}e": (_1_7B, experts) for experts in (32, 64, 128, 256)},
    "8b-64e": (_8B, 64),
    "64b-64e": (_64B, 64),
}
"""Name -> the model, experts in every other layer."""


def get_config(arg: str = "0.1b-64e") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/glam.py", arg, [*SIZES, "runlocal"])
    model, experts = SIZES.get(arg, SIZES["0.1b-64e"])
    config = Config(
        model=ModelConfig(
            **model,
            family="decoder_only",
            vocab_size=256_000,
            pattern=("moe", "dense") if experts else ("dense",),
            activation="geglu",
            expert_activation="gelu",
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            router="gshard",
            num_experts=experts or 64,
            num_selected_experts=2,
            group_size=2048,
            fill_order="token_by_token",
            jitter_noise=0.0,
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=256_000, num_sentinels=0, batch_size=1024, decoder_length=1024
        ),
        train=TrainConfig(steps=572_000),  # 600B tokens
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
