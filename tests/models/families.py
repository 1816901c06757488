"""A tiny model of each family and layer kind, and batches for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig
from switchjax.models.families import build
from switchjax.models.model import Model
from tests.parameters import random_parameters

_SIZES: dict[str, Any] = {"vocab_size": 48, "d_model": 16, "d_ff": 32, "num_heads": 4, "d_head": 4}
_TEXT = DataConfig(objective="causal", vocabulary="none", batch_size=8, decoder_length=12)
_IMAGES = DataConfig(objective="classification", batch_size=8)
_GPT = ModelConfig(
    **_SIZES,
    family="decoder_only",
    num_decoder_layers=2,
    norm="layer",
    biases=True,
    positions="learned",
    max_length=16,
    activation="gelu",
    scale_scores=True,
    scale_logits=False,
)
_MOE = MoEConfig(num_experts=4, group_size=12, min_expert_capacity=2, jitter_noise=0.0)
_TOP_2 = dataclasses.replace(_MOE, router="top_k", num_selected_experts=2, fill_order="token_by_token")


def _lm(moe: MoEConfig, **model: Any) -> Config:
    return Config(model=dataclasses.replace(_GPT, **model), moe=moe, data=_TEXT)


FAMILIES: dict[str, Config] = {
    "gpt": _lm(_MOE),
    "mixtral": _lm(
        _TOP_2,
        positions="rotary",
        norm="rms",
        biases=False,
        activation="swiglu",
        num_kv_heads=2,
        sliding_window=6,
        tie_embeddings=False,
        pattern=("moe",),
    ),
    "sinusoidal": _lm(_MOE, positions="sinusoidal"),
    "glam": _lm(_TOP_2, positions="relative", activation="geglu", expert_activation="gelu", biases=False),
    "pyramid": _lm(dataclasses.replace(_MOE, experts_per_layer=(4, 4, 8), num_shared_experts=1), num_decoder_layers=6),
    "base": _lm(dataclasses.replace(_MOE, router="base"), pattern=("dense", "base", "dense"), num_decoder_layers=3),
    "peer": _lm(
        dataclasses.replace(_MOE, num_experts=64, num_selected_experts=4, options={"peer_heads": 2, "peer_query": 8}),
        pattern=("dense", "peer", "dense"),
        num_decoder_layers=3,
    ),
    "lstm": _lm(
        _TOP_2,
        family="recurrent",
        norm="none",
        positions="none",
        biases=False,
        activation="relu",
        pattern=("lstm", "moe_only", "lstm"),
        num_decoder_layers=3,
        d_lstm=20,
    ),
    "v_moe": Config(
        model=dataclasses.replace(
            _GPT,
            family="vision",
            num_encoder_layers=2,
            image_size=8,
            patch_size=4,
            image_channels=2,
            num_classes=5,
            pre_logits=True,
        ),
        moe=dataclasses.replace(_MOE, router="v_moe", num_selected_experts=2, group_size=5),
        data=_IMAGES,
    ),
}
TEXT = [name for name, config in FAMILIES.items() if config.data.objective == "causal"]


def make_model(config: Config, seed: int = 0) -> Model:
    return random_parameters(lambda: build(config, jax.random.key(0)), seed)


def make_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Two sequences per row and padding at the end; or images, the last of which only fills up the batch."""
    rng = np.random.default_rng(seed)
    rows, model = config.data.batch_size, config.model
    if model.family == "vision":
        shape = (rows, model.image_size, model.image_size, model.image_channels)
        labels = rng.integers(0, model.num_classes, rows).astype(np.int32)
        labels[-1] = -1
        return {"images": rng.integers(0, 256, shape).astype(np.uint8), "labels": labels}
    length = config.data.decoder_length
    first = rng.integers(2, length // 2, size=(rows, 1))
    second = first + rng.integers(2, length // 2, size=(rows, 1))
    position = np.arange(length)
    segments = np.where(position < first, 1, np.where(position < second, 2, 0)).astype(np.int32)
    tokens = [np.where(segments > 0, rng.integers(1, model.vocab_size, segments.shape), 0) for _ in range(2)]
    names = ("decoder_inputs", "decoder_targets")
    return {**{n: t.astype(np.int32) for n, t in zip(names, tokens, strict=True)}, "decoder_segments": segments}


def loss_of(model: Model, batch: dict[str, jax.Array], key: PRNGKeyArray | None) -> jax.Array:
    """The cross entropy of the targets plus the load-balance losses."""
    logits, reports = model(batch, key)
    targets, segments = model.targets(batch)
    chosen = jax.nn.one_hot(targets, logits.shape[-1])
    log_probs = jnp.sum(jax.nn.log_softmax(logits.astype(jnp.float32)) * chosen, axis=-1)
    loss = -jnp.sum(log_probs, where=segments > 0) / jnp.sum(segments > 0, dtype=jnp.float32)
    for report in reports.values():
        if report.metrics is not None:
            loss += jnp.mean(report.losses["load_balance_loss"] / jnp.maximum(report.metrics.tokens, 1.0))
    return loss


loss_and_gradients = jax.jit(jax.value_and_grad(loss_of))
forward = jax.jit(lambda model, batch, key: model(batch, key)[0])
