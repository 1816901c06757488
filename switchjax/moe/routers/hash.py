"""Hash layers (Roller et al. 2021): a fixed table gives the expert of each token id."""

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
    """balanced uses the corpora's token counts, clustered the embeddings of `init_from`."""

    def __post_init__(self) -> None:
        check_choices("moe.options", self)


def hash_router(sizes: RouterSizes, options: HashOptions, key: PRNGKeyArray) -> dict[str, Weight]:
    """A random table [V]; float32 like all parameters of a model, which is exact for up to 2^24 experts.

    Raises:
        UserError: if the model has no vocabulary.
    """
    if not sizes.vocab_size:
        raise UserError("moe.router=hash needs token ids, but this layer's inputs have no vocabulary")
    table = random_table(sizes.vocab_size, sizes.num_experts, key)
    return {"table": Weight(table.astype(jnp.float32), axes=(None,), trained=False)}


def route_hash(weights: Weights, tokens: Tokens, config: MoEConfig, options: HashOptions) -> Routing:
    """Sends each token to `table[id]` with gate 1: nothing is trained, so no gate needs a gradient.

    Probabilities are one-hot, so load_balance_loss (1 at perfect balance) measures balance but has no gradient.

    Raises:
        UserError: if the tokens have no ids.
    """
    if tokens.ids is None:
        raise UserError("moe.router=hash needs token ids, but this layer received none")
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
    """An expert for each id, drawn uniformly at random (random hash)."""
    return jax.random.randint(key, (vocab_size,), 0, num_experts)


def balanced_table(counts: Int[np.ndarray, "V"], num_experts: int) -> Int[np.ndarray, "V"]:
    """An expert for each id, given how often ids occur (balanced assignment).

    Ids go to the expert with the smallest total so far, the most frequent first, so totals differ by at most the
    largest count. Ids that never occur are dealt to the experts in turn.
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
    """An expert for each id, the same for ids with similar embeddings, by Lloyd's k-means (clustered hash).

    The first centres are ids drawn at random. A cluster that loses all its ids keeps its centre.

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
