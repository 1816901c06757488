"""How many tokens a second a train step takes here, and how many transformers' own model in PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from switchjax.analysis.layer_benchmark import median_times
from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from switchjax.interop.check import import_transformers
from switchjax.interop.config import write_config
from switchjax.interop.families import family_of
from switchjax.parallel.mesh import make_mesh
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

EXPERTS = (0, 8, 32)
"""Of every other layer; 0: a dense T5."""
NumpyBatch = dict[str, Int[np.ndarray, "B L"]]
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
            batch = random_batch(config)
            tokens = batch["encoder_tokens"].size + batch["decoder_inputs"].size
            programs = {"here": our_step(config, batch), "there": their_step(config, batch, module)}
            times = median_times(programs, repeats)
            here, there = (1000 * tokens / times[name] for name in ("here", "there"))
            speeds = f"{here:,.0f} | {there:,.0f} | {here / there:.2f}"
            lines.append(f"| {experts or 'dense'} | {dropout} | {tokens:,} | {speeds} |")
            report(lines[-1])
    return "\n".join(lines)


def random_batch(config: Config, seed: int = 0) -> NumpyBatch:
    """Rows of random ids without padding."""
    rng, data = np.random.default_rng(seed), config.data

    def ids(length: int) -> Int[np.ndarray, "B L"]:
        return rng.integers(3, config.model.vocab_size, (data.batch_size, length)).astype(np.int32)

    encoder, targets = ids(data.encoder_length), ids(data.decoder_length)
    return {
        "encoder_tokens": encoder,
        "encoder_segments": np.ones_like(encoder),
        "decoder_inputs": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_targets": targets,
        "decoder_segments": np.ones_like(targets),
    }


def our_step(config: Config, batch: NumpyBatch) -> Callable[[], Any]:
    """One step at each call, on one device; returns its loss."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_state(config, mesh)
    step = lower_train_step(config, plan, mesh).compile()
    placed = jax.device_put(batch, jax.devices()[0])
    state = plan.create()

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, placed)
        return jax.block_until_ready((state, metrics))[1]["loss"]

    return run


def their_step(config: Config, batch: NumpyBatch, module: Any) -> Callable[[], Any]:
    """As `our_step`, of transformers' model of the same config."""
    import torch

    torch.set_num_threads(THREADS)
    theirs = write_config(config) | ({"output_router_logits": True} if config.model.has_experts else {})
    architecture = family_of(theirs).architecture
    settings = getattr(module, architecture.replace("ForConditionalGeneration", "Config"))(**theirs)
    model = getattr(module, architecture)(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate)
    ids, labels = (torch.from_numpy(batch[name]).long() for name in ("encoder_tokens", "decoder_targets"))
    mask = torch.ones_like(ids)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run
