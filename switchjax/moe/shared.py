"""Experts that every token passes through, in addition to the routed ones: residual MoE and shared experts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.moe.choice import router_logits
from switchjax.moe.layer import MoELayer
from switchjax.moe.routing import RoutingReport


class SharedMoELayer(nnx.Module):
    """`shared(x) + routed(x)`, residual MoE (DeepSpeed-MoE, Rajbhandari et al. 2022, section 4.1).

    With `moe.shared_mixing=learned`, as in DeepSpeed's code: `w_1 shared(x) + w_2 routed(x)`, `w = softmax(x W + b)`.

    `shared` is a network from [*, D] to [*, D], called as `shared(x, key)`.
    """

    def __init__(self, shared: nnx.Module, routed: MoELayer, d_model: int, key: PRNGKeyArray):
        self.shared, self.routed = shared, routed
        self.learned = routed.config.shared_mixing == "learned"
        if self.learned:
            init = jax.nn.initializers.truncated_normal(0.02)
            self.mixing = nnx.Param(init(key, (d_model, 2), jnp.float32), axes=("embed", None))
            self.mixing_bias = nnx.Param(jnp.zeros(2), axes=(None,))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RoutingReport]:
        """Applies both, called as `MoELayer`. A token without a slot still passes through the shared experts."""
        shared_key, routed_key = (None, None) if key is None else jax.random.split(key)
        shared = self.shared(x, shared_key)
        routed, report = self.routed(x, token_mask, routed_key, token_ids)
        if not self.learned:
            return shared + routed, report
        logits = router_logits(x.astype(jnp.float32), self.mixing[...]) + self.mixing_bias[...][None, None]
        weight = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        return shared * weight[..., :1] + routed * weight[..., 1:], report

    def next_state(self, sums: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        """`MoELayer.next_state` of the routed layer, with the names of this layer."""
        return {f"routed/{name}": value for name, value in self.routed.next_state(sums).items()}
