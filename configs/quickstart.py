"""The quickstart: a Switch Transformer and a dense T5 of equal FLOPs per token, on real English text, on two cores.

python scripts/train.py --config=configs/quickstart.py:switch --workdir=runs/quickstart/switch
python scripts/train.py --config=configs/quickstart.py:dense --workdir=runs/quickstart/dense

Sizes: switch, dense; study and faults for `benchmark.py routers` and `faults`; runlocal for a small machine.

Both run on 8 emulated devices (data 2 x expert 4). They differ only in every other feed-forward layer. After 1400 steps
they are about equal: with seeds 0, 1 and 2, held-out losses are 4.345, 4.305 and 4.298 (switch) and 4.333, 4.287 and
4.300 (dense).
"""

import dataclasses

from ml_collections import ConfigDict

from switchjax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    check_choice,
)

SIZES = {"switch": ("dense", "moe"), "dense": ("dense", "dense")}


def get_config(arg: str = "switch") -> ConfigDict:
    """The config of one of the two models, or of a smaller form of the first (study, faults, runlocal)."""
    check_choice("configs/quickstart.py", arg, [*SIZES, "study", "faults", "runlocal"])
    config = Config(
        model=ModelConfig(
            vocab_size=2048,
            d_model=64,
            d_ff=256,
            num_heads=4,
            d_head=16,
            num_encoder_layers=4,
            num_decoder_layers=2,
            pattern=SIZES.get(arg, SIZES["switch"]),
            scan_layers=False,
        ),
        moe=MoEConfig(num_experts=8, group_size=64),
        mesh=MeshConfig(data=2, expert=4, emulated_devices=8),
        data=DataConfig(
            corpora=("kjv", "newsgroups", "austen", "state_of_the_union"),
            vocabulary_size=2000,
            num_sentinels=48,
            batch_size=16,
            encoder_length=128,
            decoder_length=32,
        ),
        optimizer=OptimizerConfig(schedule="cosine", learning_rate=0.1, warmup_steps=40),
        train=TrainConfig(steps=1400, log_every=20, checkpoint_every=700),
        evaluate=EvaluateConfig(every=200, batches=16),
    )
    if arg == "study":  # short, on one device
        config = dataclasses.replace(config, mesh=MeshConfig(), train=TrainConfig(steps=200, log_every=10))
    if arg in ("faults", "runlocal"):
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, corpora=("kjv",)), train=TrainConfig(steps=2, log_every=1)
        )
    if arg == "faults":  # tiny, on two devices; logs every step and writes many checkpoints
        sizes = {"d_model": 16, "d_ff": 32, "num_heads": 2, "d_head": 8, "num_encoder_layers": 2}
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, tie_embeddings=False, **sizes),
            moe=dataclasses.replace(config.moe, num_experts=4),
            mesh=MeshConfig(expert=2, emulated_devices=2),
            data=dataclasses.replace(config.data, batch_size=4),
            train=TrainConfig(steps=60, log_every=1, checkpoint_every=4),
            evaluate=EvaluateConfig(every=20, batches=16),
        )
    return config.to_config_dict()
