"""Experts in the place of the attention's weights (Switch Transformer, appendix A)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.attention import attend
from switchjax.models.cache import KeyValues
from switchjax.models.layers import INIT_SCALE, kernel, project, split_key
from switchjax.moe.layer import MoELayer, RoutingSums


class LinearExpert(nnx.Module):
    """`x W`, from [N, D] to [N, M]; whole on each device of `model`, as every head needs it all."""

    def __init__(self, d_in: int, d_out: int, scale: float, dtype: str, key: PRNGKeyArray):
        self.weight = kernel(key, (d_in, d_out), ("embed", None), dtype, scale=scale)

    def __call__(
        self, x: Float[Array, "N D"], key: PRNGKeyArray | None, matmul: Callable[[Array, Array], Array] = project
    ) -> Float[Array, "N M"]:
        """Applies the weights, as `FeedForward` does; there is no dropout."""
        return matmul(x, self.weight[...].astype(x.dtype))


class SwitchAttention(nnx.Module):
    """Self-attention in which one router chooses a token's query weights and another its key and value weights.

    A token over capacity asks with a query of zeros, or offers a key and a value of zeros. Unstable in bfloat16, the
    paper says; the routers are in float32 here as everywhere.
    """

    def __init__(self, config: Config, key: PRNGKeyArray):
        self.config = model = config.model
        query_key, value_key, out_key = jax.random.split(key, 3)
        width, dtype = model.num_heads * model.d_head, model.param_dtype
        query = partial(LinearExpert, model.d_model, width, INIT_SCALE / model.d_head, dtype)
        key_value = partial(LinearExpert, model.d_model, 2 * width, INIT_SCALE, dtype)
        self.query = MoELayer(query, model.d_model, config.moe, query_key, model.vocab_size)
        self.key_value = MoELayer(key_value, model.d_model, config.moe, value_key, model.vocab_size)
        shape = (model.num_heads, model.d_head, model.d_model)
        self.out = kernel(out_key, shape, ("heads", "head", "embed"), dtype, num_inputs=2)

    def keys_values(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None,
    ) -> tuple[KeyValues, RoutingSums]:
        """Keys and values of `x`, and the routing sums of their router; the key is that of the queries' call."""
        _, value_key, _ = split_key(key, 3)
        both, sums = self.key_value(x, token_mask, value_key, token_ids)
        keys, values = jnp.split(both.reshape(*x.shape[:2], -1, self.config.d_head), 2, axis=2)
        return KeyValues(keys, values), sums

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: KeyValues,
        token_mask: Bool[Array, "B L"],
        mask: Bool[Array, "B 1 L N"],
        bias: Float[Array, "#B H L N"] | None,
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L D"], RoutingSums]:
        """Attends from `x` to `context`, the `keys_values` of `x` and of what came before it."""
        query_key, _, dropout_key = split_key(key, 3)
        query, sums = self.query(x, token_mask, query_key, token_ids)
        query = query.reshape(*x.shape[:2], -1, self.config.d_head)
        recomputed = self.config.remat != "none"
        mixed = attend(query, context.keys, context.values, mask, bias, self.config.dropout, dropout_key, recomputed)
        return project(mixed, self.out[...].astype(x.dtype), num_inputs=2), sums
