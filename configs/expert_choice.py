"""Expert choice (Zhou et al. 2022): each expert takes the tokens that it scores highest; a token has two on average.

python scripts/train.py --config=configs/expert_choice.py:0.1b-64e --workdir=runs/expert_choice_0.1b_64e

Sizes: 0.1b, 8b (dense), 0.1b-16e, 0.1b-32e, 0.1b-64e, 0.1b-128e, 8b-64e; runlocal for a small machine.

The decoder is GLaM's. A later token can take an earlier token's place with an expert, so predictions depend on the
future, in the paper and here; `moe.allow_noncausal_routing` allows it.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

_0_1B = {"num_decoder_layers": 12, "d_model": 768, "d_ff": 3072, "num_heads": 12, "d_head": 64}
_8B = {"num_decoder_layers": 32, "d_model": 4096, "d_ff": 16_384, "num_heads": 32, "d_head": 128}

SIZES = {
    "0.1b": (_0_1B, 0),
    "8b": (_8B, 0),
    **{f"0.1b-{experts}e": (_0_1B, experts) for experts in (16, 32, 64, 128)},
    "8b-64e": (_8B, 64),
}
"""Name -> the model, experts in every other layer."""


def get_config(arg: str = "0.1b-64e") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/expert_choice.py", arg, [*SIZES, "runlocal"])
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
            router="expert_choice",
            num_experts=experts or 64,
            group_size=2048,
            train_capacity_factor=2.0,
            eval_capacity_factor=2.0,
            allow_noncausal_routing=True,
            jitter_noise=0.0,
            loss_weights={"load_balance_loss": 0.0},
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=256_000, num_sentinels=0, batch_size=1024, decoder_length=1024
        ),
        train=TrainConfig(steps=500_000),
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
