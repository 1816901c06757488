"""A tiny encoder-decoder, a packed batch for it, and its loss.

Noise (keys that are not None) doubles the time to compile, so most tests do without.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.families import build
from tests.parameters import random_parameters

TINY = Config(
    model=ModelConfig(
        vocab_size=48,
        d_model=16,
        d_ff=32,
        num_heads=4,
        d_head=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        relative_buckets=8,
        relative_max_distance=16,
    ),
    moe=MoEConfig(num_experts=4, group_size=8, min_expert_capacity=2, jitter_noise=0.1, expert_dropout=0.1),
    data=DataConfig(vocabulary="none", batch_size=8, encoder_length=16, decoder_length=8),
)
Batch = dict[str, np.ndarray]


def changed(config: Config = TINY, **fields: Any) -> Config:
    """`config` with fields of its sections model and moe replaced."""
    sections = {
        name: replace(section, **{key: value for key, value in fields.items() if hasattr(section, key)})
        for name, section in (("model", config.model), ("moe", config.moe))
    }
    return replace(config, **sections)


DROPLESS = {"train_capacity_factor": 100.0, "eval_capacity_factor": 100.0}


def make_model(config: Config = TINY, seed: int = 0) -> EncoderDecoder:
    return random_parameters(lambda: build(config, jax.random.key(0)), seed)


def make_batch(config: Config = TINY, seed: int = 0) -> Batch:
    """Two sequences per row and padding at the end."""
    rng = np.random.default_rng(seed)
    rows, batch = config.data.batch_size, {}
    for side, length in (("encoder", config.data.encoder_length), ("decoder", config.data.decoder_length)):
        first = rng.integers(2, length // 2 + 1, size=(rows, 1))
        second = first + rng.integers(2, length // 2, size=(rows, 1))
        position = np.arange(length)
        batch[f"{side}_segments"] = np.where(position < first, 1, np.where(position < second, 2, 0)).astype(np.int32)
    vocabulary = config.model.vocab_size
    for name, side in (("encoder_tokens", "encoder"), ("decoder_inputs", "decoder"), ("decoder_targets", "decoder")):
        segments = batch[f"{side}_segments"]
        batch[name] = np.where(segments > 0, rng.integers(1, vocabulary, size=segments.shape), 0).astype(np.int32)
    return batch


def loss_of(model: EncoderDecoder, batch: Batch, key: PRNGKeyArray | None) -> jax.Array:
    """The cross entropy of the targets plus the layers' load-balance losses."""
    logits, reports = model(batch, key)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jax.nn.one_hot(batch["decoder_targets"], logits.shape[-1])
    tokens = batch["decoder_segments"] > 0
    cross_entropy = -jnp.sum(log_probs * chosen, where=tokens[..., None]) / jnp.sum(tokens, dtype=jnp.float32)
    return cross_entropy + sum(
        jnp.mean(report.losses["load_balance_loss"] / jnp.maximum(report.metrics.tokens, 1.0))
        for report in reports.values()
    )


loss_and_gradients = jax.jit(jax.value_and_grad(loss_of))
forward = jax.jit(lambda model, batch, key: model(batch, key)[0])
