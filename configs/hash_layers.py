"""Hash layers (Roller et al. 2021): a fixed table gives each token id its expert; the routing is not learned.

python scripts/train.py --config=configs/hash_layers.py:1x64 --workdir=runs/hash_layers_1x64

Sizes: 1x16, 1x64, 1x128 (one layer with so many experts, the 7th of 8), 3x64, 5x16 (three and five layers); runlocal
for a small machine.

The table balances the experts by the corpora's token counts; `moe.options.hash_table` selects other tables.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = {"1x16": (1, 16), "1x64": (1, 64), "1x128": (1, 128), "3x64": (3, 64), "5x16": (5, 16)}
"""Name -> layers with experts, experts."""


def get_config(arg: str = "1x64") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/hash_layers.py", arg, [*SIZES, "runlocal"])
    sparse, experts = SIZES.get(arg, SIZES["1x64"])
    config = Config(
        model=ModelConfig(
            family="decoder_only",
            vocab_size=50_257,
            d_model=1024,
            d_ff=4096,
            num_heads=16,
            num_decoder_layers=8,
            pattern=("dense",) * (7 - sparse) + ("moe",) * sparse + ("dense",),
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            max_length=1024,
            scale_scores=True,
            scale_logits=False,
            embedding_stddev=0.02,
            dropout=0.1,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            router="hash",
            num_experts=experts,
            group_size=2048,
            options={"hash_table": "balanced"},
            jitter_noise=0.0,
            loss_weights={"load_balance_loss": 0.0},
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=50_257, num_sentinels=0, batch_size=512, decoder_length=1024
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-4, schedule="cosine", warmup_steps=10_000, b2=0.98),
        train=TrainConfig(steps=200_000),
    )
    return (runlocal(config, {"pattern": ("moe", "dense")}) if arg == "runlocal" else config).to_config_dict()
