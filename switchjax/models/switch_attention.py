"""Experts instead of attention weights (Switch Transformer, appendix A)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.attention import attend
from switchjax.models.cache import KeyValues, LayerCache, seen
from switchjax.models.inputs import StackInputs
from switchjax.models.layers import INIT_SCALE, kernel, project, split_key
from switchjax.moe.layer import MoELayer
from switchjax.moe.routing import RoutingReport


class LinearExpert(nnx.Module):
    """`x W`, from [N, D] to [N, M]; each device of the axis `model` holds all of W."""

    def __init__(self, d_in: int, d_out: int, scale: float, dtype: str, key: PRNGKeyArray):
        self.weight = kernel(key, (d_in, d_out), ("embed", None), dtype, scale=scale)

    def __call__(
        self, x: Float[Array, "N D"], key: PRNGKeyArray | None, matmul: Callable[[Array, Array], Array] = project
    ) -> Float[Array, "N M"]:
        """Applies the weights, with the arguments of `FeedForward`; there is no dropout."""
        return matmul(x, self.weight[...].astype(x.dtype))


class SwitchAttention(nnx.Module):
    """Self-attention in which one router chooses a token's query weights and another its key and value weights.

    A token over capacity has a query of zeros, or a key and a value of zeros. The paper found it unstable in bfloat16;
    here the routers are in float32, as everywhere.
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

    def attend_to_itself(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None, cache: LayerCache | None
    ) -> tuple[Float[Array, "B L D"], dict[str, RoutingReport], KeyValues | None]:
        """Self-attention of a block: the output, both routers' reports, and the cache's new state if there is one."""
        query_key, value_key, dropout_key = split_key(key, 3)
        both, value_report = self.key_value(x, inputs.token_mask, value_key, inputs.tokens)
        keys, values = jnp.split(both.reshape(*x.shape[:2], -1, self.config.d_head), 2, axis=2)
        context = seen(KeyValues(keys, values), cache, inputs.slots)
        query, query_report = self.query(x, inputs.token_mask, query_key, inputs.tokens)
        query = query.reshape(*x.shape[:2], -1, self.config.d_head)
        mixed = attend(
            query,
            context.keys,
            context.values,
            inputs.self_mask,
            inputs.self_bias,
            self.config.dropout,
            dropout_key,
            recomputed=self.config.remat != "none",
        )
        y = project(mixed, self.out[...].astype(x.dtype), num_inputs=2)
        return y, {"query": query_report, "key_value": value_report}, None if cache is None else context
