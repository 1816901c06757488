"""mSwitch (Fedus, Zoph and Shazeer 2021, section 4.3): mT5-Base's Switch Transformer, for 101 languages.

python scripts/train.py --config=configs/mswitch.py:base --workdir=runs/mswitch_base

Sizes: base; runlocal for a small machine.

The paper only says that the model is FLOP-matched to mT5-Base. Hence everything except the experts is mT5-Base's (T5
1.1 with a vocabulary of 250,112), and every other layer has 128 experts, as in the paper's English models.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = ("base",)


def get_config(arg: str = "base") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/mswitch.py", arg, [*SIZES, "runlocal"])
    config = Config(
        model=ModelConfig(
            vocab_size=250_112,
            d_model=768,
            d_ff=2048,
            num_heads=12,
            num_encoder_layers=12,
            num_decoder_layers=12,
            activation="geglu",
            tie_embeddings=False,
            dtype="bfloat16",
        ),
        moe=MoEConfig(num_experts=128, group_size=2048),
        data=DataConfig(
            corpora=("c4/multilingual",),
            vocabulary_size=250_000,
            num_sentinels=100,
            batch_size=1024,
            encoder_length=1024,
            decoder_length=229,
        ),
        train=TrainConfig(steps=1_000_000),
    )
    return (runlocal(config) if arg == "runlocal" else config).to_config_dict()
