"""How many tokens a second a train step takes here, and how many transformers' own model in PyTorch."""

import statistics
from collections.abc import Callable
from typing import Any

import jax

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from switchjax.interop.check import import_transformers
from switchjax.interop.config import write_config
from switchjax.interop.families import family_of
from switchjax.studies.markdown import show_row
from switchjax.studies.step_benchmark import random_rows, train_program
from switchjax.studies.timing import Program, Ratio, interleaved_seconds

EXPERTS = (0, 8, 32)
"""Of every other layer; 0: a dense T5."""
THREADS = 2
"""That PyTorch computes with; XLA takes the cores that there are."""


def make_config(num_experts: int, dropout: float) -> Config:
    """A small Switch Transformer, or the T5 that a token costs as many multiplications in."""
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


def benchmark_beside_transformers(repeats: int, report: Callable[[str], None]) -> str:
    """Times train steps (forward, backward, AdamW) on the same random batch both ways, in turn; returns the table.

    Both are float32. The slots of an expert are counted in each as there is usual: here by a capacity factor, by
    transformers a number for each row.

    Args:
        repeats: steps of each, whose median counts.
        report: is told of each row of the table as it is finished.

    Raises:
        UserError: if torch or transformers is not installed.
    """
    lines = [
        "| experts | dropout | tokens of a step | here, tokens/s | by transformers, tokens/s | ratio |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    module = import_transformers()
    for dropout in (0.0, 0.1):
        for experts in EXPERTS:
            config = make_config(experts, dropout)
            programs = {"here": train_program(config, jax.devices()[:1]), "there": their_program(config, module)}
            tokens = config.data.batch_size * sum(config.stack_lengths.values())
            seconds = interleaved_seconds(programs, repeats)
            speeds = [f"{tokens / statistics.median(seconds[name]):,.0f}" for name in programs]
            ratio = Ratio.of(seconds["there"], seconds["here"])
            lines.append(show_row([experts or "dense", dropout, f"{tokens:,}", *speeds, ratio]))
            report(lines[-1])
    return "\n".join(lines)


def their_program(config: Config, module: Any) -> Program:
    """As `train_program`, of transformers' model of the same config."""
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
