"""Modules stacked along a named axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import PRNGKeyArray

from switchjax.parallel.sharding import parameter_specs
from switchjax.parallel.stacking import stack


class Linear(nnx.Module):
    def __init__(self, key: PRNGKeyArray):
        self.kernel = nnx.Param(jax.random.normal(key, (3, 2)), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(2), axes=("mlp",))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] * self.scale[...][None]


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), 4)


def test_each_slice_is_the_module_of_its_key(keys: jax.Array) -> None:
    stacked = stack(Linear, keys, "expert")
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(stacked.kernel[i], Linear(key).kernel[...])
    assert len({values.tobytes() for values in np.asarray(stacked.kernel[...])}) == len(keys)


def test_the_new_axis_comes_first_and_is_named(keys: jax.Array) -> None:
    stacked = stack(Linear, keys, "expert")
    assert stacked.kernel.get_metadata("axes") == ("expert", "embed", "mlp")
    assert stacked.scale.get_metadata("axes") == ("expert", "mlp")


def test_stacks_of_stacks_name_both_axes(keys: jax.Array) -> None:
    nested = stack(lambda key: stack(Linear, jax.random.split(key, 2), "expert"), keys, "layer")
    assert nested.kernel.shape == (4, 2, 3, 2)
    assert nested.kernel.get_metadata("axes") == ("layer", "expert", "embed", "mlp")


def test_a_stack_runs_under_vmap_and_scan_and_its_slices_know_their_axes(keys: jax.Array) -> None:
    stacked, x = stack(Linear, keys, "layer"), jnp.ones((5, 3))
    together = jax.vmap(lambda module: module(x))(stacked)

    def body(total: jax.Array, module: Linear) -> tuple[jax.Array, None]:
        assert tuple(parameter_specs(module).kernel) == (None, "model")
        return total + module(x), None

    total, _ = jax.lax.scan(body, jnp.zeros((5, 2)), stacked)
    np.testing.assert_allclose(total, together.sum(axis=0), rtol=1e-6)  # 4 additions in float32
