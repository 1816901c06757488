"""The Vision Transformer, and with MoE layers V-MoE (Dosovitskiy et al. 2020; Riquelme et al. 2021)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from switchjax.config import Config
from switchjax.models.inputs import Reports
from switchjax.models.layers import add_bias, bias, kernel, learned_positions, project
from switchjax.models.model import Batch, Model, below
from switchjax.models.stack import Stack
from switchjax.parallel.sharding import constrain


class VisionTransformer(Model):
    """Classifies images with an encoder of a class token and the image's patches."""

    def __init__(self, config: Config, key: PRNGKeyArray):
        self.config = model = config.model
        patch_key, position_key, encoder_key, pre_key, head_key = jax.random.split(key, 5)
        pixels, width, dtype = model.patch_size**2 * model.image_channels, model.d_model, model.param_dtype
        self.patches = kernel(patch_key, (pixels, width), (None, "embed"), dtype)
        self.patches_bias = bias(model, (width,), ("embed",))
        self.class_token = nnx.Param(jnp.zeros(width, dtype), axes=("embed",))
        self.positions = learned_positions(model, model.num_patches + 1, position_key)
        self.encoder = Stack(config, config.layers("encoder"), causal=False, cross=False, key=encoder_key)
        self.pre_logits = kernel(pre_key, (width, width), ("embed", None), dtype) if model.pre_logits else None
        self.pre_logits_bias = bias(model, (width,), (None,)) if model.pre_logits else None
        self.head = kernel(head_key, (width, model.num_classes), ("embed", None), dtype)
        self.head_bias = bias(model, (model.num_classes,), (None,))

    def __call__(self, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, "B T V"], Reports]:
        """Logits of each image's class (the only target of a row), and the encoder's reports."""
        x = patch_vectors(batch["images"], self.config.patch_size).astype(self.config.dtype)
        x = add_bias(project(x, self.patches[...].astype(x.dtype)), self.patches_bias)
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1)
        if self.positions is not None:
            x += self.positions[...].astype(x.dtype)[None]
        x = constrain(x, "batch", "length", "embed")
        x, reports = self.encoder(x, None, self.segments(batch)["encoder"], key)
        x = x[:, :1]
        if self.pre_logits is not None:
            x = jnp.tanh(add_bias(x @ self.pre_logits[...].astype(x.dtype), self.pre_logits_bias))
        return add_bias(x @ self.head[...].astype(x.dtype), self.head_bias), below("encoder", reports)

    @staticmethod
    def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """`images` as bytes, and `labels`, which are -1 in rows that only fill up the batch."""
        rows, side, channels = config.data.batch_size, config.model.image_size, config.model.image_channels
        return {
            "images": jax.ShapeDtypeStruct((rows, side, side, channels), jnp.uint8),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }

    @staticmethod
    def targets(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The class of each image."""
        return jnp.maximum(batch["labels"], 0)[:, None], _real(batch)[:, None]

    def segments(self, batch: Batch) -> dict[str, Int[Array, "B _"]]:
        """1 for each patch and the class token of a real image."""
        real = _real(batch)[:, None]
        return {"encoder": jnp.broadcast_to(real, (real.shape[0], self.config.num_patches + 1))}


def _real(batch: Batch) -> Int[Array, "B"]:
    return (batch["labels"] >= 0).astype(jnp.int32)


def patch_vectors(images: UInt8[Array, "B H W C"], size: int) -> Float[Array, "B N P"]:
    """The pixels of each patch of `size` x `size`, scaled to [-1, 1], patches row by row."""
    rows, height, width, channels = images.shape
    scaled = images.astype(jnp.float32) / 127.5 - 1
    grid = scaled.reshape(rows, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, size * size * channels)
