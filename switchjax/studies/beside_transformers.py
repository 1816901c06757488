"""Times decoding and train steps here beside those of transformers' models in PyTorch."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Int

from switchjax.config import Config, DecodingConfig, MeshConfig, MoEConfig, OptimizerConfig, TrainConfig
from switchjax.data.vocabulary import PAD
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless
from switchjax.interop.check import import_transformers, load_transformers
from switchjax.interop.config import write_config
from switchjax.interop.convert import config_of, load_huggingface
from switchjax.interop.families import family_of
from switchjax.models.families import TextModel
from switchjax.models.model import Batch
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.decode_benchmark import ROWS, make_prompts
from switchjax.studies.report import number, percent, text
from switchjax.studies.step_benchmark import DENSE, random_rows, train_program
from switchjax.studies.timing import Program, Ratio, interleaved_seconds

EXPERTS = (0, 8, 32)
"""Experts of every other layer; 0 makes a dense T5."""
THREADS = 2
"""Threads of PyTorch; XLA takes all cores."""


@dataclass(frozen=True)
class TransformersDecodeRow:
    """Median speeds of greedy decoding with one model, here and by transformers."""

    model: Annotated[str, text("model")]
    rows: Annotated[int, number("rows")]
    tokens_per_second: Annotated[float, number("{new_tokens} tokens here, tokens/s", "{:.0f}".format)]
    transformers_tokens_per_second: Annotated[float, number("by transformers, tokens/s", "{:.0f}".format)]
    speedup: Annotated[Ratio, number("ratio")]
    fraction_alike: Annotated[float, number("tokens alike", partial(percent, digits=0))]
    new_tokens: int


@dataclass(frozen=True)
class TransformersStepRow:
    """Median speeds of a float32 train step (forward, backward, AdamW), here and by transformers."""

    experts: Annotated[int, number("experts", lambda experts: str(experts or "dense"))]
    dropout: Annotated[float, number("dropout")]
    tokens: Annotated[int, number("tokens of a step", "{:,}".format)]
    tokens_per_second: Annotated[float, number("here, tokens/s", "{:,.0f}".format)]
    transformers_tokens_per_second: Annotated[float, number("by transformers, tokens/s", "{:,.0f}".format)]
    speedup: Annotated[Ratio, number("ratio")]


def measure_decoding(folders: Sequence[Path], new_tokens: int, repeats: int) -> Iterator[TransformersDecodeRow]:
    """Times greedy decoding of `new_tokens` tokens with the model of each Hugging Face folder, both ways in turn.

    Raises:
        UserError: if torch or transformers is not installed, or a folder holds no text model that can be read.
    """
    module, mesh = import_transformers(), make_mesh(MeshConfig(), jax.devices()[:1])
    decoding = DecodingConfig(max_new_tokens=new_tokens)
    for folder in folders:
        model = load_huggingface(folder, dropless(config_of(folder)), mesh)
        assert isinstance(model, TextModel), "dropless refuses the others"
        theirs, num_ids = load_transformers(folder, module, {}), model.config.vocab_size
        for rows in ROWS:
            batch = make_prompts(model.config.family == "encoder_decoder", rows, num_ids)
            # No token has the id -1, so every row gets all its tokens.
            here: Program = partial(generate, model, batch, decoding, num_ids, eos=-1)
            there: Program = partial(generate_by_transformers, theirs, batch, new_tokens)
            alike = float(np.mean(np.asarray(here()) == there()))
            speeds = _speeds(rows * new_tokens, here, there, repeats)
            yield TransformersDecodeRow(str(folder), rows, *speeds, alike, new_tokens)


def _speeds(tokens: int, here: Program, there: Program, repeats: int) -> tuple[float, float, Ratio]:
    """Median tokens per second here and there, and the ratio of the first to the second."""
    seconds = interleaved_seconds({"here": here, "there": there}, repeats)
    ours, theirs = (tokens / statistics.median(seconds[name]) for name in ("here", "there"))
    return ours, theirs, Ratio.of(seconds["there"], seconds["here"])


def generate_by_transformers(model: Any, batch: Batch, new_tokens: int) -> Int[np.ndarray, "B T"]:
    """The `T = new_tokens` tokens that transformers' model writes after the prompts of `make_prompts`."""
    import torch

    encoded = "encoder_tokens" in batch
    ids = torch.from_numpy(np.array(batch["encoder_tokens" if encoded else "decoder_inputs"])).long()
    model.generation_config.eos_token_id = None  # no text ends early
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            suppress_tokens=[PAD],  # as here
            pad_token_id=PAD,
        )
    return output.numpy()[:, 1 if encoded else ids.shape[1] :]


def make_step_config(num_experts: int, dropout: float) -> Config:
    """A small Switch Transformer, or with 0 experts a T5 of the same FLOPs a token."""
    model = replace(
        DENSE.model,
        num_encoder_layers=4,
        num_decoder_layers=4,
        pattern=("dense", "moe") if num_experts else ("dense",),
        dropout=dropout,
        scan_layers=False,  # as in PyTorch
    )
    moe = MoEConfig(num_experts=num_experts, group_size=512, expert_dropout=dropout) if num_experts else MoEConfig()
    return Config(
        model=model,
        moe=moe,
        data=replace(DENSE.data, encoder_length=128, decoder_length=32),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant", warmup_steps=1),
        train=TrainConfig(steps=1_000_000, z_loss_weight=0.0),
    )


def measure_training(repeats: int) -> Iterator[TransformersStepRow]:
    """Times train steps on the same random batch both ways, in turn.

    Each side sets the slots of an expert in its own way: here by a capacity factor, there by a number for each row.

    Raises:
        UserError: if torch or transformers is not installed.
    """
    module = import_transformers()
    for dropout, experts in itertools.product((0.0, 0.1), EXPERTS):
        config = make_step_config(experts, dropout)
        tokens = config.data.batch_size * sum(config.stack_lengths.values())
        here, there = train_program(config, jax.devices()[:1]), their_program(config, module)
        yield TransformersStepRow(experts, dropout, tokens, *_speeds(tokens, here, there, repeats))


def their_program(config: Config, module: Any) -> Program:
    """Like `train_program`, with transformers' model of the same config."""
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
