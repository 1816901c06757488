"""A tiny Switch Transformer on the small corpora of the data tests."""

import dataclasses
from pathlib import Path

import pytest

from switchjax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)


@pytest.fixture(scope="session")
def tiny(data_config: DataConfig) -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=352,
            d_model=16,
            d_ff=32,
            num_heads=2,
            d_head=8,
            num_encoder_layers=2,
            num_decoder_layers=2,
        ),
        moe=MoEConfig(num_experts=4, group_size=96),
        mesh=MeshConfig(data=2, expert=4),
        data=dataclasses.replace(data_config, batch_size=24),
        optimizer=OptimizerConfig(warmup_steps=10),
        train=TrainConfig(steps=6, log_every=1, checkpoint_every=2, keep_checkpoints=2),
        evaluate=EvaluateConfig(every=3, batches=1),
    )


def changed(config: Config, **sections: dict[str, object]) -> Config:
    """`config` with fields of sections replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def losses(workdir: Path) -> dict[int, float]:
    """Step -> training loss, from metrics.jsonl."""
    from switchjax.training.metrics import read_metrics

    return {record["step"]: record["loss"] for record in read_metrics(workdir, "train")}
