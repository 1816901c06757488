"""Noisy top-K: token choice under Gaussian noise, balanced by importance and by an estimate of load with a gradient."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.losses import importance_loss, load_loss
from switchjax.moe.routing import (
    BALANCE,
    NoOptions,
    Router,
    RouterSizes,
    Routing,
    Tokens,
    Weight,
    Weights,
    is_chosen,
    normalize_over_chosen,
    router_logits,
    select_experts,
)

MIN_NOISE = 1e-2
"""The least standard deviation of trained noise, as in the released code: the load estimate divides by it."""


def noisy_router(sizes: RouterSizes, options: Any, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_g and W_noise [D, E], both 0 at first: noise alone spreads the tokens (Shazeer et al. 2017, appendix A)."""
    return {name: zeros(sizes.d_model, sizes.num_experts) for name in ("logits", "noise")}


def zeros(rows: int, columns: int) -> Weight:
    """Weights that start at 0."""
    return Weight(jnp.zeros((rows, columns), jnp.float32), ("embed", None))


def route_noisy_top_k(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """The sparsely-gated layer's noisy top-K gating (Shazeer et al. 2017, eq. 3-11).

    `H = x W_g + N(0, 1) softplus(x W_noise)`, without the noise in evaluation; gates are the softmax over the K
    highest of H. A single expert's gate is its probability among all E: over the one kept it would be 1, and without
    gradient. With weights of 0, as at first, all H are equal in evaluation and the first experts are taken.

    `moe.sample_experts` draws on top of the noise, of which alone the load loss knows.
    """
    clean, raw_std = router_logits(tokens.x, weights["logits"]), router_logits(tokens.x, weights["noise"])
    choice = noisy_top_k(tokens, config, clean, raw_std)
    return token_choice(
        tokens,
        config,
        logits=clean,
        probs=choice.probs,
        gates=choice.gates,
        expert_index=choice.expert_index,
        losses={
            "importance_loss": importance_loss(jnp.where(choice.chosen, choice.gates, 0.0), tokens.mask),
            "load_loss": load_loss(choice.load_probability, tokens.mask),
        },
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoisyTopK:
    """One level's gating."""

    probs: Float[Array, "G S E"]
    """softmax(H)."""
    gates: Float[Array, "G S E"]
    """Softmax over the kept K, for these; for the others what it would take to add them."""
    expert_index: Int[Array, "G S K"]
    chosen: Bool[Array, "G S E"]
    load_probability: Float[Array, "G S E"]
    """P(x, i) of eq. 8; in evaluation, where nothing is random, 1 for the chosen."""


def noisy_top_k(
    tokens: Tokens, config: MoEConfig, clean: Float[Array, "G S E"], raw_std: Float[Array, "G S E"]
) -> NoisyTopK:
    """Noisy top-K gating of `clean` under noise of standard deviation `softplus(raw_std)`."""
    std = jnp.maximum(jax.nn.softplus(raw_std), MIN_NOISE)
    noisy = add_noise(tokens, clean, std)
    expert_index = select_experts(tokens, config, noisy)
    chosen = is_chosen(expert_index, clean.shape[-1])
    gates = probs = jax.nn.softmax(noisy, axis=-1)
    if config.num_selected_experts > 1:
        gates = normalize_over_chosen(probs, expert_index)
    if tokens.training:
        load = load_probability(clean, std, noisy, config.num_selected_experts)
    else:
        load = chosen.astype(jnp.float32)
    return NoisyTopK(probs, gates, expert_index, chosen, load)


def add_noise(tokens: Tokens, clean: Float[Array, "G S E"], std: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
    """`clean + N(0, 1) std` in training, `clean` in evaluation."""
    if not tokens.training:
        return clean
    return clean + std * tokens.random("router noise", lambda key: jax.random.normal(key, clean.shape[1:]))


def load_probability(
    clean: Float[Array, "*T E"], std: Float[Array, "*T E"], noisy: Float[Array, "*T E"], k: int
) -> Float[Array, "*T E"]:
    """P(x, i) that expert i is among the k highest if its own noise alone is drawn anew (Shazeer et al. 2017, eq. 8-9).

    `Phi((clean_i - kth_excluding(noisy, k, i)) / std_i)`; 1 where k = E.
    """
    if k == clean.shape[-1]:
        return jnp.ones_like(clean)
    return jax.scipy.stats.norm.cdf((clean - kth_excluding(noisy, k)) / std)


def kth_excluding(values: Float[Array, "*T E"], k: int) -> Float[Array, "*T E"]:
    """For each i the k-th highest of the values other than `values[i]`; k < E."""
    top = highest(values, k + 1)
    kth, after = top[..., k - 1 : k], top[..., k:]
    # Without one of the k highest, the (k + 1)-th moves up; equals make no difference.
    return jnp.where(values > after, after, kth)


def highest(values: Float[Array, "*T E"], k: int) -> Float[Array, "*T k"]:
    """The k highest values in order, by masked sums: the derivative of a gather would be a scatter."""
    index = jax.lax.top_k(jax.lax.stop_gradient(values), k)[1]
    return jnp.sum(values[..., None, :], axis=-1, where=jax.nn.one_hot(index, values.shape[-1], dtype=bool))


IMPORTANCE = {**BALANCE, "importance_loss": 0.0, "load_loss": 0.0}
"""The losses of routers with noise."""

NOISY_TOP_K = Router(route_noisy_top_k, noisy_router, losses=IMPORTANCE)
