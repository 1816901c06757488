"""Auxiliary losses and metrics of routing, as sums over the tokens of each group.

Sums add up over groups, devices and micro-batches, and a token of padding adds nothing to them; `summarize` divides by
the token count once, at the end.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def load_balance_loss(
    router_probs: Float[Array, "G S E"], expert_index: Int[Array, "G S K"], token_mask: Bool[Array, "G S"]
) -> Float[Array, "G"]:
    """`E sum_e f_e P_e` of each group times its number of tokens (Switch Transformer, eq. 4-6).

    f_e is the fraction of choices that fall on expert e, before capacity; P_e the mean probability of e. 1 a token at
    perfect balance, for every K.
    """
    num_experts = router_probs.shape[-1]
    tokens = jnp.maximum(jnp.sum(token_mask, axis=1, dtype=jnp.float32), 1)[:, None]
    taken = jnp.broadcast_to(token_mask[..., None], expert_index.shape)
    fraction = choices_of_experts(expert_index, taken, num_experts) / (tokens * expert_index.shape[-1])
    mean_probability = jnp.sum(router_probs, axis=1, where=token_mask[..., None]) / tokens
    return num_experts * jnp.sum(fraction * mean_probability, axis=-1) * tokens[:, 0]


def router_z_loss(logits: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """`sum_s logsumexp(logits)^2` (ST-MoE, eq. 5): keeps the logits small."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=1, where=token_mask)


def importance_loss(gates: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """`CV(sum_s g_e)^2` over the experts of each group times its number of tokens (Shazeer et al. 2017, eq. 6-7).

    Args:
        gates: 0 for an expert that is not kept.
        token_mask: False for padding.
    """
    return _imbalance(gates, token_mask)


def load_loss(load_probability: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """`CV(sum_s P(s, e))^2` over the experts of each group times its number of tokens (Shazeer et al. 2017, eq. 10-11).

    Args:
        load_probability: P(s, e), that token s chooses expert e.
        token_mask: False for padding.
    """
    return _imbalance(load_probability, token_mask)


def _imbalance(values: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """Squared coefficient of variation of the experts' sums, for each token of the group; 0 at balance."""
    total = jnp.sum(values, axis=1, where=token_mask[..., None])
    mean = jnp.mean(total, axis=-1, keepdims=True)
    relative = total / jnp.where(mean > 0, mean, 1.0)  # a group of padding has no mean
    return jnp.var(relative, axis=-1) * jnp.sum(token_mask, axis=1, dtype=jnp.float32)


def routing_metrics(
    router_probs: Float[Array, "G S E"],
    expert_index: Int[Array, "G S K"],
    taken: Bool[Array, "G S K"],
    dispatched: Int[Array, "G"],
    token_mask: Bool[Array, "G S"],
) -> dict[str, Float[Array, "G *E"]]:
    """Sums from which `summarize` makes the metrics.

    Args:
        router_probs: probabilities of the experts.
        expert_index: the experts that each token selected.
        taken: the choices that ask for a slot.
        dispatched: choices that found one.
        token_mask: False for padding.
    """
    probs = jax.lax.stop_gradient(router_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(probs), 0.0), axis=-1)
    return {
        "tokens": jnp.sum(token_mask, axis=1, dtype=jnp.float32),
        "routed": jnp.sum(taken, axis=(1, 2), dtype=jnp.float32),
        "dispatched": dispatched.astype(jnp.float32),
        "expert_load": choices_of_experts(expert_index, taken, probs.shape[-1]),
        "router_entropy": jnp.sum(entropy, axis=1, where=token_mask),
        "router_confidence": jnp.sum(jnp.max(probs, axis=-1), axis=1, where=token_mask),
    }


def choices_of_experts(
    expert_index: Int[Array, "G S K"], taken: Bool[Array, "G S K"], num_experts: int
) -> Float[Array, "G E"]:
    """How many choices fall on each expert, before capacity."""
    chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32)
    return jnp.sum(chosen, axis=(1, 2), where=taken[..., None])


def summarize(sums: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """Losses and metrics under their fixed names, from sums over tokens (any leading axes, e.g. layers).

    Returns:
        The losses of the router, such as load_balance_loss (1 at perfect balance), router_entropy (nats) and
        router_confidence (the highest probability) as means over tokens; fraction_tokens_dropped (of the choices that
        asked for a slot); expert_load (share of the choices before capacity, sums to 1), and the shares of the most
        and the least used expert, expert_load_top and expert_load_bottom.
    """
    tokens = jnp.maximum(sums["tokens"], 1.0)
    routed = jnp.maximum(sums["routed"], 1.0)
    means = [name for name in sums if name.endswith("_loss")] + ["router_entropy", "router_confidence"]
    load = sums["expert_load"] / jnp.maximum(jnp.sum(sums["expert_load"], axis=-1, keepdims=True), 1.0)
    return {name: sums[name] / tokens for name in means} | {
        "fraction_tokens_dropped": (sums["routed"] - sums["dispatched"]) / routed,
        "expert_load": load,
        "expert_load_top": jnp.max(load, axis=-1),
        "expert_load_bottom": jnp.min(load, axis=-1),
    }
