"""Dropless experts: grouped matrix products give what buffers for every token give."""

import jax
import numpy as np
import pytest

from switchjax.config import MeshConfig, MoEConfig, UserError
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings
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


def test_without_drops_a_sequence_does_not_depend_on_its_batch_mates() -> None:
    layer = make_layer(router="top_k", num_selected_experts=2, dropless=True, group_size=1000)
    (x, mask), (other, _) = make_inputs(), make_inputs(seed=1)
    mixed = np.concatenate([x[:3], other[3:]])
    mask = np.ones_like(mask)
    y, changed = (run(layer, rows, mask, None)[0] for rows in (x, mixed))
    np.testing.assert_array_equal(y[:3], changed[:3])


@pytest.mark.parametrize("changes", [{"dropless": False}, {"dropless": True, "expert_dropout": 0.1}])
def test_what_ragged_cannot_do_is_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=r"moe\.dispatch=ragged"):
        MoEConfig(dispatch="ragged", **changes)
