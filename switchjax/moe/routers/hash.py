"""Hash layers (Roller et al. 2021): a token's expert follows from its id alone, by a table that never changes."""

import heapq
import warnings
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy.cluster.vq import kmeans2

from switchjax.config import MoEConfig, UserError, check_choices
from switchjax.moe.capacity import token_choice
from switchjax.moe.routing import Router, RouterSizes, Routing, Tokens, Weight, Weights

_LLOYD_ITERATIONS = 20


@dataclass(frozen=True)
class HashOptions:
    """Options of router hash."""

    hash_table: Literal["random", "balanced", "clustered"] = "random"
    """balanced goes by the corpora's token counts, clustered by the embeddings of `init_from`."""

    def __post_init__(self) -> None:
        check_choices("moe.options", self)


def hash_router(sizes: RouterSizes, options: HashOptions, key: PRNGKeyArray) -> dict[str, Weight]:
    """A random table [V]; float32 as all of a model's leaves are, exact for up to 2^24 experts.

    Raises:
        UserError: if the model has no vocabulary.
    """
    if not sizes.vocab_size:
        raise UserError("moe.router=hash goes by token ids, but this layer's inputs have no vocabulary")
    table = random_table(sizes.vocab_size, sizes.num_experts, key)
    return {"table": Weight(table.astype(jnp.float32), axes=(None,), trained=False)}


def route_hash(weights: Weights, tokens: Tokens, config: MoEConfig, options: HashOptions) -> Routing:
    """Each token to `table[id]`, with weight 1: nothing is trained, so no gate is needed for a gradient.

    Its probabilities are one-hot, so load_balance_loss, 1 at perfect balance, is a measure here and no loss.

    Raises:
        UserError: if the tokens have no ids.
    """
    if tokens.ids is None:
        raise UserError("moe.router=hash goes by token ids, but this layer was given none")
    expert_index = jnp.take(weights["table"], tokens.ids, axis=0)[..., None].astype(jnp.int32)
    probs = jax.nn.one_hot(expert_index[..., 0], config.num_experts, dtype=jnp.float32)
    return token_choice(
        tokens,
        config,
        logits=jnp.zeros_like(probs),
        probs=probs,
        gates=jnp.ones_like(probs),
        expert_index=expert_index,
    )


def random_table(vocab_size: int, num_experts: int, key: PRNGKeyArray) -> Int[Array, "V"]:
    """An expert for each id, drawn uniformly (random hash)."""
    return jax.random.randint(key, (vocab_size,), 0, num_experts)


def balanced_table(counts: Int[np.ndarray, "V"], num_experts: int) -> Int[np.ndarray, "V"]:
    """Ids, most frequent first, each to the expert with the least total so far (balanced assignment).

    The experts' totals lie within the largest count of one another. Ids never seen weigh nothing and are dealt in turn.

    Args:
        counts: how often each id occurs.
        num_experts: E.
    """
    by_count = np.argsort(-counts, kind="stable")
    seen, unseen = np.split(by_count, [np.count_nonzero(counts)])
    table = np.empty(len(counts), np.int32)
    table[unseen] = np.arange(len(unseen)) % num_experts
    totals = [(0, expert) for expert in range(num_experts)]
    for token in seen:
        total, expert = totals[0]
        table[token] = expert
        heapq.heapreplace(totals, (total + int(counts[token]), expert))
    return table


def clustered_table(vectors: Float[np.ndarray, "V D"], num_experts: int, seed: int) -> Int[np.ndarray, "V"]:
    """Ids whose vectors are alike to the same expert (clustered hash): Lloyd's k-means.

    The first centres are ids drawn at random; a cluster that loses all its ids keeps its centre.

    Args:
        vectors: embeddings of a trained model.
        num_experts: E, the number of clusters.
        seed: for the first centres.

    Raises:
        UserError: if there are fewer ids than experts.
    """
    if len(vectors) < num_experts:
        raise UserError(f"hash_table=clustered cannot divide {len(vectors)} ids into {num_experts} clusters")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        wide = vectors.astype(np.float32)
        _, table = kmeans2(wide, num_experts, iter=_LLOYD_ITERATIONS, minit="points", rng=np.random.default_rng(seed))
    return table


HASH = Router(route_hash, hash_router, options=HashOptions, selected=(1,))
