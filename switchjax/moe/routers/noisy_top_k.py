"""Noisy top-K: token choice under Gaussian noise, balanced by importance and by a differentiable estimate of load."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import is_chosen, normalize_over_chosen, router_logits, select_experts
from switchjax.moe.losses import importance_loss, load_loss
from switchjax.moe.routing import BALANCE, NoOptions, Router, RouterSizes, Routing, Tokens, Weight, Weights

MIN_NOISE = 1e-2
"""Smallest standard deviation of the trained noise, as in the released code: the load estimate divides by it."""


def noisy_router(sizes: RouterSizes, options: Any, key: PRNGKeyArray) -> dict[str, Weight]:
    """W_g and W_noise [D, E], both 0, so that only noise spreads tokens at first (Shazeer et al. 2017, appendix A)."""
    return {name: zeros(sizes.d_model, sizes.num_experts) for name in ("logits", "noise")}


def zeros(rows: int, columns: int) -> Weight:
    """A weight [rows, columns] that starts at 0."""
    return Weight(jnp.zeros((rows, columns), jnp.float32), ("embed", None))


def route_noisy_top_k(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """The sparsely-gated layer's noisy top-K gating (Shazeer et al. 2017, eq. 3-11).

    `H = x W_g + N(0, 1) softplus(x W_noise)`, without the noise in evaluation; gates are the softmax over the K highest
    of H. For K = 1 the gate is the probability among all E: a softmax over one expert is 1 and has no gradient. With
    the initial weights of 0, all H are equal in evaluation, which selects the first experts.

    `moe.sample_experts` draws after this noise is added; the load loss does not account for that draw.
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
    """The gating of one level."""

    probs: Float[Array, "G S E"]
    """softmax(H)."""
    gates: Float[Array, "G S E"]
    """The softmax over the K selected experts; for other experts, their probability on the same scale."""
    expert_index: Int[Array, "G S K"]
    chosen: Bool[Array, "G S E"]
    load_probability: Float[Array, "G S E"]
    """P(x, i) of eq. 8; in evaluation, where nothing is random, 1 for the chosen experts."""


def noisy_top_k(
    tokens: Tokens, config: MoEConfig, clean: Float[Array, "G S E"], raw_std: Float[Array, "G S E"]
) -> NoisyTopK:
    """Noisy top-K gating of the logits `clean` under noise of standard deviation `softplus(raw_std)`."""
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
    """`Phi((clean_i - kth_excluding(noisy, k, i)) / std_i)` (Shazeer et al. 2017, eq. 8-9); 1 if k = E.

    The probability that expert i is among the k highest if only its own noise is drawn again.
    """
    if k == clean.shape[-1]:
        return jnp.ones_like(clean)
    return jax.scipy.stats.norm.cdf((clean - kth_excluding(noisy, k)) / std)


def kth_excluding(values: Float[Array, "*T E"], k: int) -> Float[Array, "*T E"]:
    """For each i, the k-th highest of all values except `values[i]`; k < E."""
    top = highest(values, k + 1)
    kth, after = top[..., k - 1 : k], top[..., k:]
    # If i is one of the k highest, the (k + 1)-th moves up; among equal values, both are the same.
    return jnp.where(values > after, after, kth)


def highest(values: Float[Array, "*T E"], k: int) -> Float[Array, "*T k"]:
    """The k highest values, highest first."""
    # Masked sums and not a gather, whose derivative would be a scatter.
    index = jax.lax.top_k(jax.lax.stop_gradient(values), k)[1]
    return jnp.sum(values[..., None, :], axis=-1, where=jax.nn.one_hot(index, values.shape[-1], dtype=bool))


IMPORTANCE = {**BALANCE, "importance_loss": 0.0, "load_loss": 0.0}
"""The losses of routers with noise."""

NOISY_TOP_K = Router(route_noisy_top_k, noisy_router, losses=IMPORTANCE)
