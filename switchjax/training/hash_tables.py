"""Fills the tables of hash layers from token counts or from the embeddings of another run."""

from collections.abc import Callable, Collection, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Bool, Float, Int

from switchjax.config import Config, UserError, load_workdir_config
from switchjax.data.data import Data
from switchjax.data.rows import HostBatch
from switchjax.models.model import Model
from switchjax.models.parameter_paths import parameter_paths
from switchjax.moe.routers import router_options
from switchjax.moe.routers.hash import balanced_table, clustered_table
from switchjax.parallel.sharding import named_leaves, with_leaves

_COUNTED_TOKENS = 1_000_000
"""Number of tokens that gives reliable counts of the frequent ids, on which balance depends."""


def with_hash_tables(model: Model, config: Config, data: Data, taken: Collection[str] = ()) -> Model:
    """A new run's model in which every hash layer has the table that `moe.options.hash_table` asks for.

    A balanced table follows from the counts of the ids that routers see in training, a clustered one from the vectors
    of the embedding, which come from `init_from`. Layers in `taken`, the names by layer of parameters from `init_from`,
    keep a table of the same kind, with which their experts were trained.

    Raises:
        UserError: if `hash_table` is clustered and `init_from` names no run.
    """
    moe, source = config.moe, config.init_from.workdir
    if moe.router != "hash" or not config.model.routes_groups:
        return model
    kind = router_options(moe).hash_table
    if kind == "random":
        return model
    if kind == "clustered" and not source:
        raise UserError("hash_table=clustered clusters the embeddings of a trained model: set init_from.workdir")
    if source:
        there = load_workdir_config(Path(source)).moe
        if there.router != "hash" or router_options(there).hash_table != kind:
            taken = ()
    leaves = named_leaves(model)
    paths = parameter_paths(config, (name for name in leaves if name.endswith("router/table")))
    fresh = {name: np.array([layer not in taken for layer in path.by_layer]) for name, path in paths.items()}
    if not any(map(np.any, fresh.values())):
        return model
    make_table: Callable[[int], Any]  # E -> [V]
    if kind == "balanced":
        make_table = partial(balanced_table, count_tokens(data.train_batches(), config.model.vocab_size))
    else:
        vectors = process_allgather(leaves["embedding/vectors"], tiled=True)
        make_table = partial(clustered_table, vectors, seed=config.train.seed)
    table_for = cache(make_table)
    for name, path in paths.items():
        leaf = leaves[name]  # [N, V]: N layers
        fill = jax.jit(partial(_fill, fresh[name]), out_shardings=leaf.sharding)
        leaves[name] = fill(leaf, table_for(path.num_experts))
    return with_leaves(model, leaves)


def _fill(fresh: Bool[np.ndarray, "N"], leaf: Float[Array, "N V"], table: Int[Array, "V"]) -> Float[Array, "N V"]:
    """`leaf` with the table in those of its N layers that are `fresh`."""
    return jnp.where(fresh[:, None], table.astype(leaf.dtype)[None], leaf)


def count_tokens(
    batches: Iterable[HostBatch], vocab_size: int, at_least: int = _COUNTED_TOKENS
) -> Int[np.ndarray, "V"]:
    """The number of times that routers of either stack meet each id, in the first batches with `at_least` tokens."""
    counts = np.zeros(vocab_size, np.int64)
    for batch in batches:
        for tokens, segments in (("encoder_tokens", "encoder_segments"), ("decoder_inputs", "decoder_segments")):
            if tokens in batch:
                counts += np.bincount(batch[tokens][batch[segments] > 0], minlength=vocab_size)
        if counts.sum() >= at_least:
            break
    return counts
