"""Dropless experts: grouped matrix products equal buffers with room for every token."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from switchjax.accounting.hardware import parse_slice
from switchjax.config import MeshConfig, UserError
from switchjax.moe.ragged import grouped_product, megablox_product
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings
from switchjax.planning.topology import describe_devices
from switchjax.studies.compile_benchmark import compiled_programs_in
from tests.moe.layers import make_inputs, make_layer, run, run_with_gradients

KEY = jax.random.key(7)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
@pytest.mark.parametrize(("router", "selected"), [("switch", 1), ("top_k", 2), ("top_k", 4), ("gshard", 2)])
def test_ragged_gather_and_einsum_agree_in_outputs_and_gradients(
    router: str, selected: int, key: jax.Array | None
) -> None:
    x, mask = make_inputs()
    forms = [
        run_with_gradients(
            make_layer(router=router, num_selected_experts=selected, dropless=True, dispatch=form), x, mask, key
        )
        for form in ("ragged", "gather", "einsum")
    ]
    assert forms[0][0][1][1]["dispatched"] == forms[0][0][1][1]["routed"]
    # float32 sums in another order.
    for other in forms[1:]:
        for a, b in zip(jax.tree.leaves(forms[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 1, 2)])
def test_ragged_experts_on_a_mesh_are_those_of_one_device(shape: tuple[int, int, int]) -> None:
    layer = make_layer(router="top_k", num_selected_experts=2, dropless=True, dispatch="ragged")
    inputs = make_inputs()
    expected = run_with_gradients(layer, *inputs, KEY)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        actual = run_with_gradients(jax.device_put(layer, parameter_shardings(layer, mesh)), *inputs, KEY)
    # float32 sums over 128 tokens, in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize(("rows", "sizes"), [(200, [60, 0, 90, 7]), (256, [128, 64, 64, 0]), (3, [0, 1, 0, 2])])
def test_the_kernels_of_tpus_are_ragged_dot_with_its_gradients(rows: int, sizes: list[int]) -> None:
    keys = jax.random.split(KEY, 3)
    x, weights = jax.random.normal(keys[0], (rows, 24)), jax.random.normal(keys[1], (4, 24, 40))
    wanted = jax.random.normal(keys[2], (rows, 40))

    def loss(product: Callable[..., jax.Array]) -> Any:
        def distance(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = product(x, weights, jnp.array(sizes))
            return jnp.sum(jnp.square(y - wanted)), y

        return jax.value_and_grad(distance, argnums=(0, 1), has_aux=True)(x, weights)

    found, expected = loss(partial(megablox_product, interpret=True)), loss(jax.lax.ragged_dot)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_grouped_products_on_tpus_do_not_compute_every_expert(dtype: str) -> None:
    device = SingleDeviceSharding(describe_devices(parse_slice("v5e:1x1"))[0])
    shapes = [((4096, 1024), dtype), ((16, 1024, 2048), dtype), ((16,), "int32")]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=device) for shape in shapes]

    def loss(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(grouped_product(x, weights, sizes).astype(jnp.float32)))

    with compiled_programs_in(None):  # what is compiled for a device that is not there cannot be read again
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=device).lower(*arguments).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(3 * 2 * 4096 * 1024 * 2048, rel=0.02)


def test_without_drops_a_sequence_does_not_depend_on_its_batch_mates() -> None:
    layer = make_layer(router="top_k", num_selected_experts=2, dropless=True, group_size=1000)
    (x, mask), (other, _) = make_inputs(), make_inputs(seed=1)
    mixed = np.concatenate([x[:3], other[3:]])
    mask = np.ones_like(mask)
    y, changed = (run(layer, rows, mask, None)[0] for rows in (x, mixed))
    np.testing.assert_array_equal(y[:3], changed[:3])


@pytest.mark.parametrize(
    "changes",
    [{"dropless": False}, {"dropless": True, "expert_dropout": 0.1}, {"dropless": True, "router": "expert_choice"}],
)
def test_what_ragged_cannot_do_is_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=r"moe\.dispatch=ragged"):
        make_layer(dispatch="ragged", **changes)
