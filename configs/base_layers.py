"""BASE layers (Lewis et al. 2021): a decoder with extra layers of experts, each of which gets equally many tokens.

python scripts/train.py --config=configs/base_layers.py:128 --workdir=runs/base_layers_128

Sizes: 8, 32, 128 (experts, one per worker, in one layer in the middle), 128-x3 (three layers); runlocal for a small
machine.

The other 24 layers are those of GPT-3 1.3B, which is our choice. A balanced assignment decides each token's expert in
training; in evaluation each token goes to its best expert.
"""

from ml_collections import ConfigDict

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, check_choice
from switchjax.config.runlocal import runlocal

SIZES = {"8": (8, 1), "32": (32, 1), "128": (128, 1), "128-x3": (128, 3)}
"""Name -> experts, BASE layers."""


def get_config(arg: str = "128") -> ConfigDict:
    """The config of a size."""
    check_choice("configs/base_layers.py", arg, [*SIZES, "runlocal"])
    experts, inserted = SIZES.get(arg, SIZES["128"])
    config = Config(
        model=ModelConfig(
            family="decoder_only",
            vocab_size=50_257,
            d_model=2048,
            d_ff=8192,
            num_heads=32,
            num_decoder_layers=24 + inserted,
            pattern=_pattern(24, inserted),
            activation="gelu",
            norm="layer",
            biases=True,
            positions="learned",
            max_length=1024,
            scale_scores=True,
            scale_logits=False,
            embedding_stddev=0.02,
            dtype="bfloat16",
        ),
        moe=MoEConfig(
            router="base",
            num_experts=experts,
            group_size=1024,
            eval_capacity_factor=4.0,
            jitter_noise=0.0,
            loss_weights={"load_balance_loss": 0.0},
        ),
        data=DataConfig(
            objective="causal", vocabulary_size=50_257, num_sentinels=0, batch_size=1024, decoder_length=1024
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=2000,
            b2=0.98,
            weight_decay=0.01,
            clip_norm=0.1,
        ),
        train=TrainConfig(steps=100_000),
    )
    layers = {"num_decoder_layers": 3, "pattern": _pattern(2, 1)}
    return (runlocal(config, layers) if arg == "runlocal" else config).to_config_dict()


def _pattern(layers: int, inserted: int) -> tuple[str, ...]:
    """Divides the dense layers into equal parts, with a BASE layer between each two."""
    part = ("dense",) * (layers // (inserted + 1))
    return (*part, "base") * inserted + part
