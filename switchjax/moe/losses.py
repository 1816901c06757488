"""Auxiliary losses and metrics of routing, as sums over the tokens of each group.

Sums add up over groups, devices and micro-batches, and padding adds nothing to them. `summarize` divides by the token
count once, at the end.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def load_balance_loss(
    router_probs: Float[Array, "G S E"], expert_index: Int[Array, "G S K"], token_mask: Bool[Array, "G S"]
) -> Float[Array, "G"]:
    """`E sum_e f_e P_e` of each group times its number of tokens (Switch Transformer, eq. 4-6).

    f_e is the fraction of choices that fall on expert e, before capacity; P_e is the mean probability of e. The loss is
    1 per token at perfect balance, for every K.
    """
    num_experts = router_probs.shape[-1]
    tokens = jnp.maximum(jnp.sum(token_mask, axis=1, dtype=jnp.float32), 1)[:, None]
    taken = jnp.broadcast_to(token_mask[..., None], expert_index.shape)
    fraction = count_choices(expert_index, taken, num_experts) / (tokens * expert_index.shape[-1])
    mean_probability = jnp.sum(router_probs, axis=1, where=token_mask[..., None]) / tokens
    return num_experts * jnp.sum(fraction * mean_probability, axis=-1) * tokens[:, 0]


def router_z_loss(logits: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """`sum_s logsumexp(logits)^2` (ST-MoE, eq. 5): keeps the logits small."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=1, where=token_mask)


def importance_loss(gates: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """`CV(sum_s g_e)^2` over the experts of each group times its number of tokens (Shazeer et al. 2017, eq. 6-7).

    CV is the coefficient of variation, which is 0 at balance. The gate of an expert that is not kept must be 0.
    """
    total = jnp.sum(gates, axis=1, where=token_mask[..., None])
    mean = jnp.mean(total, axis=-1, keepdims=True)
    relative = total / jnp.where(mean > 0, mean, 1.0)  # a group of padding has no mean
    return jnp.var(relative, axis=-1) * jnp.sum(token_mask, axis=1, dtype=jnp.float32)


def load_loss(load_probability: Float[Array, "G S E"], token_mask: Bool[Array, "G S"]) -> Float[Array, "G"]:
    """`importance_loss` of the probabilities P(s, e) that token s chooses expert e (Shazeer et al. 2017, eq. 10-11)."""
    return importance_loss(load_probability, token_mask)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingMetrics:
    """Counts and sums over the routed tokens; N stands for leading axes such as groups or layers."""

    tokens: Float[Array, "*N"]
    routed: Float[Array, "*N"]
    """Choices that asked for a slot."""
    dispatched: Float[Array, "*N"]
    """Choices that found a slot."""
    expert_load: Float[Array, "*N E"]
    """Choices that fall on each expert, before capacity."""
    router_entropy: Float[Array, "*N"]
    """In nats."""
    router_confidence: Float[Array, "*N"]
    """The highest probability of each token."""


def sum_metrics(
    router_probs: Float[Array, "G S E"],
    expert_index: Int[Array, "G S K"],
    taken: Bool[Array, "G S K"],
    dispatched: Int[Array, "G"],
    token_mask: Bool[Array, "G S"],
) -> RoutingMetrics:
    """The metrics of each group, where `taken` choices asked for a slot and `dispatched` is how many found one."""
    probs = jax.lax.stop_gradient(router_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(probs), 0.0), axis=-1)
    return RoutingMetrics(
        tokens=jnp.sum(token_mask, axis=1, dtype=jnp.float32),
        routed=jnp.sum(taken, axis=(1, 2), dtype=jnp.float32),
        dispatched=dispatched.astype(jnp.float32),
        expert_load=count_choices(expert_index, taken, probs.shape[-1]),
        router_entropy=jnp.sum(entropy, axis=1, where=token_mask),
        router_confidence=jnp.sum(jnp.max(probs, axis=-1), axis=1, where=token_mask),
    )


def count_choices(
    expert_index: Int[Array, "G S K"], taken: Bool[Array, "G S K"], num_experts: int
) -> Float[Array, "G E"]:
    """Number of choices that fall on each expert, before capacity."""
    chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32)
    return jnp.sum(chosen, axis=(1, 2), where=taken[..., None])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingSummary:
    """Metrics of routing under their fixed names, one row per layer."""

    router_entropy: Float[Array, "*N"]
    """Mean over tokens, nats."""
    router_confidence: Float[Array, "*N"]
    """Mean over tokens of the highest probability."""
    fraction_tokens_dropped: Float[Array, "*N"]
    """Fraction of the choices that asked for a slot and found none."""
    expert_load: Float[Array, "*N E"]
    """Share of the choices before capacity; sums to 1."""

    @property
    def expert_load_top(self) -> Float[Array, "*N"]:
        """Share of the most used expert."""
        return jnp.max(self.expert_load, axis=-1)

    @property
    def expert_load_bottom(self) -> Float[Array, "*N"]:
        """Share of the least used expert."""
        return jnp.min(self.expert_load, axis=-1)

    @property
    def dead_experts(self) -> Float[Array, "*N"]:
        """Number of experts that no token chose."""
        return jnp.sum(self.expert_load == 0, axis=-1, dtype=jnp.float32)


def summarize(metrics: RoutingMetrics) -> RoutingSummary:
    """Means and shares from sums over tokens."""
    tokens, routed = jnp.maximum(metrics.tokens, 1.0), jnp.maximum(metrics.routed, 1.0)
    choices = jnp.maximum(jnp.sum(metrics.expert_load, axis=-1, keepdims=True), 1.0)
    return RoutingSummary(
        router_entropy=metrics.router_entropy / tokens,
        router_confidence=metrics.router_confidence / tokens,
        fraction_tokens_dropped=(metrics.routed - metrics.dispatched) / routed,
        expert_load=metrics.expert_load / choices,
    )
