"""A whole model computes the same on a mesh as on one device, and exchanges only what its layout needs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import Config, MeshConfig
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings, partition_spec
from switchjax.planning.hlo_collectives import count_collectives
from tests.models.examples import changed, loss_and_gradients, make_batch, make_model

KEY = jax.random.key(5)
# One MoE layer a stack, with jitter.
CONFIG = changed(pattern=("moe",), num_encoder_layers=1, num_decoder_layers=1, expert_dropout=0.0)


def lower_on(shape: tuple[int, int, int], config: Config) -> tuple[jax.stages.Compiled, tuple]:
    """The compiled loss and gradients on a mesh, and the arguments divided over it."""
    mesh, model = make_mesh(MeshConfig(*shape)), make_model(config)
    shardings = parameter_shardings(model, mesh)
    arguments = (
        jax.device_put(model, shardings),
        jax.device_put(make_batch(config), NamedSharding(mesh, partition_spec("batch"))),
        KEY,
    )
    step = jax.jit(loss_and_gradients, out_shardings=(None, shardings))
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile(), arguments


SLOW = [pytest.param(shape, marks=pytest.mark.slow) for shape in [(2, 2, 2), (8, 1, 1)]]


@pytest.mark.parametrize("shape", [(2, 4, 1), *SLOW])
def test_loss_and_gradients_are_those_of_one_device(shape: tuple[int, int, int]) -> None:
    compiled, arguments = lower_on(shape, CONFIG)
    loss, gradients = compiled(*arguments)
    expected_loss, expected = loss_and_gradients(make_model(CONFIG), make_batch(CONFIG), KEY)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        # float32 sums in the order of another mesh: 1e-5 of the parameter's largest gradient.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


def test_a_train_step_holds_4_all_to_alls_a_moe_layer_and_no_all_gather() -> None:
    compiled, _ = lower_on((2, 4, 1), CONFIG)
    counts = count_collectives(compiled)
    assert counts["all-to-all"] == 4 * 2
    assert "all-gather" not in counts
    assert "collective-permute" not in counts


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "exchanges"), [("full", 6), ("exchange", 4)])
def test_remat_repeats_the_exchange_unless_its_results_are_kept(remat: str, exchanges: int) -> None:
    compiled, _ = lower_on((2, 4, 1), changed(CONFIG, remat=remat, num_encoder_layers=2, num_decoder_layers=2))
    counts = count_collectives(compiled)
    assert counts["all-to-all"] == exchanges * 2  # each stack's loop body holds one MoE layer
    assert "all-gather" not in counts


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_optimised_a_train_step_holds_the_same_all_to_alls_and_no_all_gather() -> None:
    compiled, _ = lower_on((2, 4, 1), CONFIG)
    counts = count_collectives(compiled)
    assert counts["all-to-all"] == 4 * 2
    assert counts.keys() <= {"all-to-all", "all-reduce"}
