"""The interface of all families of models to training, evaluation and planning."""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.inputs import Reports
from switchjax.parallel.sharding import constrain

Batch = dict[str, Integer[Array, "B ..."]]
"""Arrays whose first axis is the batch; `Model.batch_shapes` lists them."""


class Model(nnx.Module):
    """A network from a batch to the logits of its targets."""

    @abstractmethod
    def __init__(self, config: Config, key: PRNGKeyArray): ...

    @abstractmethod
    def __call__(self, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, "B T V"], Reports]:
        """Logits of each target, and the reports of all layers with experts; the key is None in evaluation."""

    @staticmethod
    @abstractmethod
    def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """The names, shapes and types of a global batch."""

    @staticmethod
    @abstractmethod
    def targets(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The targets that the logits predict, and their segments; 0 where there is nothing to predict."""

    @abstractmethod
    def segments(self, batch: Batch) -> dict[str, Int[Array, "B _"]]:
        """The segments of each stack's tokens; 0 for padding, which is not routed."""


def token_arrays(rows: int, length: int, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of arrays of token ids or segments."""
    return {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}


def embed(embedding: Any, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Token vectors, divided over the mesh."""
    return constrain(embedding(tokens), "batch", "length", "embed")


def below(name: str, reports: Reports) -> Reports:
    """The reports of a module's parts, named from the module that holds it as `name`."""
    return {f"{name}/{part}": report for part, report in reports.items()}
