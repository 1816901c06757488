"""Times train steps here, beside those of transformers' own model in PyTorch."""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import jax

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from switchjax.interop.check import import_transformers
from switchjax.interop.config import write_config
from switchjax.interop.families import family_of
from switchjax.studies.report import number
from switchjax.studies.step_benchmark import random_rows, train_program
from switchjax.studies.timing import Program, Ratio, interleaved_seconds

EXPERTS = (0, 8, 32)
"""Experts of every other layer; 0 makes a dense T5."""
THREADS = 2
"""Threads of PyTorch; XLA takes all cores."""


@dataclass(frozen=True)
class TransformersStepRow:
    """Median speeds of a float32 train step (forward, backward, AdamW), here and by transformers."""

    experts: Annotated[int, number("experts", lambda experts: str(experts or "dense"))]
    dropout: Annotated[float, number("dropout")]
    tokens: Annotated[int, number("tokens of a step", "{:,}".format)]
    tokens_per_second: Annotated[float, number("here, tokens/s", "{:,.0f}".format)]
    transformers_tokens_per_second: Annotated[float, number("by transformers, tokens/s", "{:,.0f}".format)]
    speedup: Annotated[Ratio, number("ratio")]


def make_config(num_experts: int, dropout: float) -> Config:
    """A small Switch Transformer, or a T5 of the same FLOPs a token."""
    moe = MoEConfig(num_experts=num_experts, group_size=512, expert_dropout=dropout) if num_experts else MoEConfig()
    return Config(
        model=ModelConfig(
            vocab_size=2048,
            d_model=256,
            d_ff=1024,
            num_heads=4,
            num_encoder_layers=4,
            num_decoder_layers=4,
            pattern=("dense", "moe") if num_experts else ("dense",),
            dropout=dropout,
            scan_layers=False,  # as PyTorch has it
        ),
        moe=moe,
        data=DataConfig(batch_size=16, encoder_length=128, decoder_length=32),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant", warmup_steps=1),
        train=TrainConfig(steps=1_000_000, z_loss_weight=0.0),
    )


def measure_beside_transformers(repeats: int) -> Iterator[TransformersStepRow]:
    """Times train steps on the same random batch both ways, in turn.

    An expert's slots are counted as is usual on each side: here by a capacity factor, there as a number for each row.

    Args:
        repeats: steps of each, whose medians count.

    Raises:
        UserError: if torch or transformers is not installed.
    """
    module = import_transformers()
    for dropout, experts in itertools.product((0.0, 0.1), EXPERTS):
        config = make_config(experts, dropout)
        programs = {"here": train_program(config, jax.devices()[:1]), "there": their_program(config, module)}
        tokens = config.data.batch_size * sum(config.stack_lengths.values())
        seconds = interleaved_seconds(programs, repeats)
        yield TransformersStepRow(
            experts=experts,
            dropout=dropout,
            tokens=tokens,
            tokens_per_second=tokens / statistics.median(seconds["here"]),
            transformers_tokens_per_second=tokens / statistics.median(seconds["there"]),
            speedup=Ratio.of(seconds["there"], seconds["here"]),
        )


def their_program(config: Config, module: Any) -> Program:
    """Does what `train_program` does with transformers' model of the same config."""
    import torch

    torch.set_num_threads(THREADS)
    theirs = write_config(config) | ({"output_router_logits": True} if config.model.has_experts else {})
    architecture = family_of(theirs).architecture
    settings = getattr(module, architecture.replace("ForConditionalGeneration", "Config"))(**theirs)
    model = getattr(module, architecture)(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate)
    batch = random_rows(config)
    ids, labels = (torch.from_numpy(batch[name]).long() for name in ("encoder_tokens", "decoder_targets"))
    mask = torch.ones_like(ids)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
