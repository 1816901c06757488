"""Soft MoE: every slot is a mixture of all tokens (Puigcerver et al. 2023, "From sparse to soft mixtures of experts").

Nothing is chosen or dropped: dispatch and combine become matrix products. Slots cross devices as in a sparse layer, by
all-to-alls over `expert`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import MoEConfig, UserError, check_positive, from_mapping
from switchjax.moe.expert_parallel import apply_experts, apply_experts_over_mesh, are_sliced
from switchjax.moe.routing import RoutingReport
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import parameter_specs, partition_spec
from switchjax.parallel.stacking import stack


@dataclass(frozen=True)
class SoftMoEOptions:
    """Options of soft MoE, in `moe.options`."""

    slots_per_expert: int = 1
    """P, slots of an expert for each row of the batch."""

    def __post_init__(self) -> None:
        check_positive("moe.options", {"slots_per_expert": self.slots_per_expert})


def soft_weights(
    x: Float[Array, "B L D"], mask: Bool[Array, "B L"], phi: Float[Array, "D E P"], scale: Float[Array, ""]
) -> tuple[Float[Array, "B L E P"], Float[Array, "B L E P"]]:
    """The weights with which slots mix tokens and tokens mix slots, both in float32 (equations 1 and 2).

    Both are softmaxes of the same logits, the cosines of each token and each slot's direction `phi` times `scale`.

    Returns:
        dispatch: sums to 1 over the tokens of a row; 0 for padding.
        combine: sums to 1 over the slots; 0 for padding.
    """
    # Cosines (section 2.3), because plain products would make the softmaxes of a wide model one-hot.
    cosines = jnp.einsum(
        "bld,dep->blep",
        _normalize(x.astype(jnp.float32), axis=2),
        _normalize(phi.astype(jnp.float32), axis=0),
        precision=jax.lax.Precision.HIGHEST,
    )
    logits, real = scale.astype(jnp.float32) * cosines, mask[..., None, None]
    dispatch = jax.nn.softmax(logits, axis=1, where=real)
    return dispatch, jnp.where(real, jax.nn.softmax(logits, axis=(2, 3)), 0.0)


def _normalize(x: Array, axis: int) -> Array:
    """`x / |x|`; where x is 0, this is 0 and has a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + 1e-12)


class SoftMoELayer(nnx.Module):
    """E experts with P slots each for every row of the batch: `Y = C experts(D^T X)`, row by row.

    It costs as much as E P tokens of each row through one expert. It is not causal: a slot mixes all tokens of its row,
    so an output depends on later tokens, and packed sequences mix. All noise is the same on every mesh, except expert
    dropout where `model` > 1: each slice of d_ff draws its own. `make_expert` is as in `MoELayer`.
    """

    def __init__(
        self, make_expert: Callable[[PRNGKeyArray], nnx.Module], d_model: int, config: MoEConfig, key: PRNGKeyArray
    ):
        self.config, num_experts = config, config.num_experts
        slots_per_expert = from_mapping(SoftMoEOptions, config.options, "moe.options").slots_per_expert
        phi_key, expert_key = jax.random.split(key)
        # Only directions matter. float32 whatever the model's dtype is, like a router's weights.
        phi = jax.random.normal(phi_key, (d_model, num_experts, slots_per_expert)) / jnp.sqrt(d_model)
        self.phi = nnx.Param(phi, axes=("embed", None, None))
        self.phi_scale = nnx.Param(jnp.ones(()), axes=())
        self.experts = stack(make_expert, jax.random.split(expert_key, num_experts), "expert")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        token_mask: Bool[Array, "B L"],
        key: PRNGKeyArray | None,
        token_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L M"], RoutingReport]:
        """Mixes tokens into slots, applies the experts, mixes their outputs into tokens; zeros for padding.

        `token_ids` has no effect, and the report is empty because nothing is chosen.

        Raises:
            UserError: if rows do not divide over the mesh.
        """
        # A weight of 0 does not hide padding that is not finite: 0 times infinity is NaN.
        x = jnp.where(token_mask[..., None], x, jnp.zeros((), x.dtype))
        apply = self._apply_local if jax.sharding.get_abstract_mesh().empty else self._apply_over_mesh
        return apply(x, token_mask, key if self.config.expert_dropout else None), RoutingReport()

    def next_state(self, sums: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        """An empty dictionary, because all weights are trained."""
        return {}

    def _apply_local(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], key: PRNGKeyArray | None
    ) -> Float[Array, "B L M"]:
        slots, combine = self._dispatch(x, mask)
        return combine(apply_experts(self.experts, slots, key))

    def _apply_over_mesh(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], key: PRNGKeyArray | None
    ) -> Float[Array, "B L M"]:
        """`_apply_local` with rows and experts divided over the mesh.

        A device with b rows sends b E P D numbers of the model's dtype to the experts and receives b E P M back.
        """
        mesh = jax.sharding.get_abstract_mesh()
        shards = mesh.shape[DATA] * mesh.shape[EXPERT]
        if x.shape[0] % shards:
            raise UserError(f"{x.shape[0]} rows do not divide over the {shards} shards of data x expert")
        sliced = are_sliced(self.experts)

        def island(layer: SoftMoELayer, x: Array, mask: Array, key: PRNGKeyArray | None) -> Array:
            slots, combine = layer._dispatch(x, mask)  # [E, b, P, D]: slots of the device's own rows
            y = combine(apply_experts_over_mesh(layer.experts, slots, key))
            return jax.lax.psum(y, MODEL) if sliced else y

        rows = partition_spec("batch")
        in_specs = (parameter_specs(self), rows, rows, PartitionSpec())
        return jax.shard_map(island, in_specs=in_specs, out_specs=rows)(self, x, mask, key)

    def _dispatch(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"]
    ) -> tuple[Float[Array, "E B P D"], Callable[[Array], Array]]:
        """The slots, and the function that mixes the experts' outputs [E, B, P, M] back into tokens."""
        weights = soft_weights(x, mask, self.phi[...], self.phi_scale[...])
        dispatch, combine = (weight.astype(x.dtype) for weight in weights)
        slots = jnp.einsum("blep,bld->ebpd", dispatch, x)
        return slots, lambda y: jnp.einsum("blep,ebpm->blm", combine, y)
