"""PEER (He 2024, "Mixture of a million experts"): one-neuron experts in the middle block's feed-forward layer.

python scripts/train.py --config=configs/peer.py:1024x1024 --workdir=runs/peer

Sizes: 128x128, 256x256, 512x512, 1024x1024 (experts, as sub-keys of each half); runlocal for a small machine.

Each of 8 heads finds 16 experts. The paper compares models of equal FLOPs and many shapes but does not list the shapes;
we chose the 12 layers of GPT-3's smallest size.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = {f"{side}x{side}": side**2 for side in (128, 256, 512, 1024)}
"""Name -> experts."""


def get_config(arg: str = "1024x1024") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/peer.py", arg, [*SIZES, "runlocal"])
    config = Config(
        model=ModelConfig(
            family="decoder_only",
            vocab_size=32_000,
            d_model=768,
            d_ff=3072,
            num_heads=12,
            num_decoder_layers=12,
            pattern=("dense",) * 6 + ("peer",) + ("dense",) * 5,
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            scale_scores=True,
            scale_logits=False,
            embedding_stddev=0.02,
            dtype="bfloat16",
        ),
        moe=MoEConfig(num_experts=SIZES.get(arg, 2**20), num_selected_experts=16, options={"peer_heads": 8}),
        data=DataConfig(
            objective="causal", vocabulary_size=32_000, num_sentinels=0, batch_size=128, decoder_length=2048
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=6e-4, schedule="cosine", warmup_steps=1000, b2=0.95),
        train=TrainConfig(steps=100_000),
    )
    if arg == "runlocal":
        layers = {"num_decoder_layers": 3, "pattern": ("dense", "peer", "dense")}
        config = runlocal(config, layers, {"num_experts": 64, "num_selected_experts": 4})
    return config.to_config_dict()
