"""The MoE layer computes the same on every mesh, with the documented collectives and no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from switchjax.config import MeshConfig, UserError
from switchjax.moe.layer import MoELayer
from switchjax.moe.routers import ROUTERS
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings, partition_spec
from switchjax.planning.hlo_collectives import count_collectives
from tests.moe.layers import make_inputs, make_layer, report_of, run, run_with_gradients

Shape = tuple[int, int, int]
KEY = jax.random.key(7)

# (mesh, experts): fewer, as many and more experts than devices; each kind of mesh.
ESSENTIAL = [((2, 4, 1), 4), ((1, 8, 1), 8), ((2, 2, 2), 16)]
EVERY = [
    (mesh, experts)
    for mesh in [(8, 1, 1), (2, 4, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]
    for experts in (4, 8, 16)
    if experts % mesh[1] == 0 and (mesh, experts) not in ESSENTIAL
]
MESHES_AND_EXPERTS = ESSENTIAL + [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]


@contextmanager
def on_mesh(shape: Shape, layer: MoELayer) -> Iterator[tuple[MoELayer, np.ndarray, np.ndarray]]:
    """The layer and inputs, divided over the mesh in context."""
    x, mask = make_inputs()
    mesh = make_mesh(MeshConfig(*shape))
    batch = NamedSharding(mesh, partition_spec("batch"))
    with jax.set_mesh(mesh):
        yield jax.device_put(layer, parameter_shardings(layer, mesh)), *jax.device_put((x, mask), batch)


def assert_same_on_mesh(shape: Shape, layer: MoELayer, key: jax.Array | None) -> None:
    """Asserts that outputs, routing sums and all gradients equal those of one device without a mesh."""
    expected = run_with_gradients(layer, *make_inputs(), key)
    with on_mesh(shape, layer) as (placed, x, mask):
        actual = run_with_gradients(placed, x, mask, key)
    (_, (_, sums)), (gradient, _) = actual
    assert sums["dispatched"] < sums["routed"], "nothing was dropped: the test sees too little"
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    # float32 sums over 128 tokens, in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize(("shape", "experts"), MESHES_AND_EXPERTS)
def test_outputs_and_gradients_in_training_are_those_of_one_device(shape: Shape, experts: int) -> None:
    layer = make_layer(num_experts=experts, jitter_noise=0.2, train_capacity_factor=1.0)
    assert_same_on_mesh(shape, layer, KEY)


@pytest.mark.parametrize("shape", [(2, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_outputs_and_gradients_in_evaluation_are_those_of_one_device(shape: Shape) -> None:
    assert_same_on_mesh(shape, make_layer(num_experts=8, eval_capacity_factor=1.0), None)


@pytest.mark.slow
@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in ("switch", "hash")])
def test_every_router_with_its_noise_is_the_same_on_a_mesh(router: str) -> None:
    selected = ROUTERS[router].selected or (2,)
    layer = make_layer(router=router, num_experts=8, num_selected_experts=selected[0], train_capacity_factor=0.75)
    expected = run_with_gradients(layer, *make_inputs(), KEY)
    with on_mesh((2, 4, 1), layer) as (placed, x, mask):
        actual = run_with_gradients(placed, x, mask, KEY)
    # float32 sums over 128 tokens, in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_the_state_of_a_router_moves_on_a_mesh_as_on_one_device(key: jax.Array | None) -> None:
    layer = make_layer(router="sigmoid", num_experts=8, num_selected_experts=2, train_capacity_factor=0.75)
    expected = report_of(layer, *make_inputs(), key).state_sums
    with on_mesh((2, 4, 1), layer) as (placed, x, mask):
        actual = report_of(placed, x, mask, key).state_sums
        moved = placed.next_state(actual)
    assert actual.keys() == {"load"}
    np.testing.assert_array_equal(actual["load"], expected["load"])
    assert np.asarray(actual["load"]).sum() == 2 * np.asarray(mask).sum()
    assert len(np.unique(actual["load"])) > 2
    jax.tree.map(np.testing.assert_array_equal, moved, layer.next_state(expected))


@pytest.mark.parametrize("shape", [(2, 4, 1), pytest.param((8, 1, 1), marks=pytest.mark.slow)])
def test_expert_dropout_is_the_same_on_every_mesh_that_does_not_slice_experts(shape: Shape) -> None:
    layer = make_layer(num_experts=8, expert_dropout=0.3, jitter_noise=0.2, train_capacity_factor=1.0)
    assert_same_on_mesh(shape, layer, KEY)


def test_expert_dropout_of_the_slices_of_an_expert_is_independent() -> None:
    """With d_ff over two devices, each half draws its own mask; the mean number of kept units is the same."""
    layer = make_layer(
        num_experts=4, expert_dropout=0.5, jitter_noise=0.0, train_capacity_factor=4.0, eval_capacity_factor=4.0
    )
    # All hidden units equal: a token's output then counts the units that live.
    layer.experts.w_in[...] = np.zeros_like(layer.experts.w_in[...]) + np.float32(1)
    layer.experts.w_out[...] = np.zeros_like(layer.experts.w_out[...]) + np.float32(1)
    with on_mesh((2, 2, 2), layer) as (placed, x, mask):
        del x
        ones = jax.device_put(np.ones((*mask.shape, 8), np.float32), mask.sharding)
        noisy, quiet = np.asarray(run(placed, ones, mask, KEY)[0]), np.asarray(run(placed, ones, mask, None)[0])
    # Capacity is the group in both, so what differs is the dropout.
    alive = noisy[..., 0][np.asarray(mask)] / quiet[..., 0][np.asarray(mask)] * 8
    assert np.any(np.round(alive) % 2 == 1), "the two halves of 8 units drop in step"
    np.testing.assert_allclose(alive.mean(), 8, atol=5 * 2 / np.sqrt(alive.size))  # 5 standard errors


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_a_layer_holds_4_all_to_alls_forwards_and_backwards_and_no_all_gather(key: jax.Array | None) -> None:
    layer = make_layer(num_experts=8, expert_dropout=0.1)
    with on_mesh((2, 4, 1), layer) as (placed, x, mask):
        counts = count_collectives(run_with_gradients.lower(placed, x, mask, key).compile())
    # The rest are all-reduces of sums over the batch: the loss, the metrics and the weights' gradients.
    assert counts.pop("all-to-all") == 4
    assert counts.keys() <= {"all-reduce"}


def test_a_layer_forwards_holds_2_all_to_alls() -> None:
    with on_mesh((2, 4, 1), make_layer(num_experts=8)) as (placed, x, mask):
        counts = count_collectives(run.lower(placed, x, mask, None).compile())
    assert counts.pop("all-to-all") == 2
    assert counts.keys() <= {"all-reduce"}


def test_nothing_is_exchanged_where_no_axis_divides_the_experts() -> None:
    with on_mesh((8, 1, 1), make_layer(num_experts=8)) as (placed, x, mask):
        counts = count_collectives(run_with_gradients.lower(placed, x, mask, None).compile())
    assert counts.keys() == {"all-reduce"}


@pytest.mark.parametrize("changes", [{"group_size": 64}, {"group_size": 128}])
def test_groups_that_do_not_divide_over_the_mesh_are_refused(changes: dict[str, Any]) -> None:
    layer = make_layer(num_experts=8, **changes)
    with (
        on_mesh((2, 4, 1), layer) as (placed, x, mask),
        pytest.raises(UserError, match=r"groups of \d+ tokens do not divide over the 8 shards"),
    ):
        run(placed, x, mask, None)


def test_outputs_stay_where_their_tokens_are() -> None:
    with on_mesh((2, 4, 1), make_layer(num_experts=8)) as (placed, x, mask):
        y, sums = run(placed, x, mask, None)
    assert y.sharding.is_equivalent_to(x.sharding, y.ndim)
    assert all(value.sharding.spec == PartitionSpec() for value in sums.values())


@pytest.mark.usefixtures("optimized_programs")
def test_optimised_a_layer_holds_the_same_all_to_alls_and_no_all_gather() -> None:
    layer = make_layer(num_experts=8, expert_dropout=0.1)
    with on_mesh((2, 4, 1), layer) as (placed, x, mask):
        counts = count_collectives(run_with_gradients.lower(placed, x, mask, KEY).compile())
    assert counts.pop("all-to-all") == 4
    assert counts.keys() <= {"all-reduce"}
