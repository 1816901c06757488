"""The parts that the equations of several routers share: logits, the choice of experts, noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from switchjax.config import MoEConfig
from switchjax.moe.routing import Tokens


def router_logits(x: Float[Array, "G S D"], weight: Float[Array, "D N"]) -> Float[Array, "G S N"]:
    """`x W` in full float32."""
    # By default, the matrix units of accelerators would round the logits to bfloat16.
    return jnp.einsum("gsd,dn->gsn", x, weight, precision=jax.lax.Precision.HIGHEST)


def select_experts(tokens: Tokens, config: MoEConfig, scores: Float[Array, "G S E"]) -> Int[Array, "G S K"]:
    """The K experts with the highest scores; among equals, the first.

    In training with `moe.sample_experts`, K experts drawn without replacement from the softmax of the scores.
    """
    if config.sample_experts and tokens.training:
        # The K highest scores after Gumbel noise are such a draw.
        scores = scores + tokens.random("sample", lambda key: jax.random.gumbel(key, scores.shape[1:]))
    if config.num_selected_experts == 1:
        return jnp.argmax(scores, axis=-1, keepdims=True)
    return jax.lax.top_k(scores, config.num_selected_experts)[1]


def values_of_chosen(values: Float[Array, "G S E"], expert_index: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """The values of the chosen experts."""
    # A masked sum and not a gather, whose derivative would be a scatter.
    chosen = jax.nn.one_hot(expert_index, values.shape[-1], dtype=bool)
    return jnp.sum(values[..., None, :], axis=-1, where=chosen)


def normalize_over_chosen(values: Float[Array, "G S E"], expert_index: Int[Array, "G S K"]) -> Float[Array, "G S E"]:
    """Values divided by the sum of the chosen experts' values."""
    return values / jnp.sum(values_of_chosen(values, expert_index), axis=-1, keepdims=True)


def is_chosen(expert_index: Int[Array, "G S K"], num_experts: int) -> Bool[Array, "G S E"]:
    """True for the experts that the token chose."""
    return jnp.any(jax.nn.one_hot(expert_index, num_experts, dtype=bool), axis=2)


def jitter(x: Float[Array, "G S D"], noise: float, keys: Key[Array, "G"]) -> Float[Array, "G S D"]:
    """`x` times uniform noise in [1 - noise, 1 + noise]; a key for each group makes it the same on every mesh.

    The released Switch code multiplies the router's input, as here; the paper's pseudo-code adds to the logits.
    """
    return x * jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, 1 - noise, 1 + noise))(keys)
