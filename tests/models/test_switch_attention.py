"""Experts instead of attention weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MeshConfig
from switchjax.models.attention import Attention, attention_mask
from switchjax.models.families import build
from switchjax.models.inputs import StackInputs, metrics_by_layer
from switchjax.models.switch_attention import SwitchAttention
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import parameter_shardings
from tests.models.examples import TINY, changed, loss_and_gradients, make_batch, make_model
from tests.parameters import random_parameters

ROUTED = changed(pattern=("dense", "switch_attention"), jitter_noise=0.0, expert_dropout=0.0)


def test_one_expert_is_dense_attention() -> None:
    config = changed(ROUTED, num_experts=1)
    routed = random_parameters(lambda: SwitchAttention(config, jax.random.key(0)))
    dense = random_parameters(lambda: Attention(config.model, jax.random.key(0)))
    heads = (config.model.d_model, config.model.num_heads, config.model.d_head)
    keys, values = jnp.split(routed.key_value.experts.weight[...][0], 2, axis=-1)
    dense.query[...] = routed.query.experts.weight[...][0].reshape(heads)
    dense.key[...], dense.value[...], dense.out[...] = keys.reshape(heads), values.reshape(heads), routed.out[...]

    batch = make_batch(config)
    segments = jnp.asarray(batch["encoder_segments"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*segments.shape, config.model.d_model)), jnp.float32)
    bias = jnp.zeros((1, config.model.num_heads, *segments.shape[1:], *segments.shape[1:]))
    real = np.asarray(segments > 0)

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask = attention_mask(segments, segments)
        inputs = StackInputs(segments, segments, mask, bias, positions=None, cross=None)
        return tuple(layer.attend_to_itself(x, inputs, None, None)[0] for layer in (routed, dense))

    y, expected = both(x)
    # Capacity is the group, the single gate is 1; float32 sums in another order.
    np.testing.assert_allclose(np.asarray(y)[real], np.asarray(expected)[real], rtol=1e-4, atol=1e-5)


def test_a_model_reports_both_routers_of_each_layer() -> None:
    _, reports = jax.jit(lambda model, batch: model(batch, None))(make_model(ROUTED), make_batch(ROUTED))
    assert {name: report.layers for name, report in reports.items()} == {
        f"{stack}/scans/0/blocks/1/self_attention/{router}": (1,)
        for stack in ("encoder", "decoder")
        for router in ("query", "key_value")
    }
    for layers in metrics_by_layer(reports).values():
        assert [layer.expert_load.shape for layer in layers] == [(4,), (4,)]


def test_ragged_experts_give_what_buffers_for_every_token_give() -> None:
    found, expected = (
        loss_and_gradients(make_model(changed(ROUTED, dropless=True, dispatch=form)), make_batch(ROUTED), None)
        for form in ("ragged", "gather")
    )
    # The models' static configs differ, so leaf by leaf; float32 sums in another order.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("remat", "kept"), [("none", 3), ("full", 0)])
def test_weights_are_kept_only_where_the_backward_pass_does_not_compute_them_again(remat: str, kept: int) -> None:
    config = changed(ROUTED, pattern=("switch_attention",), remat=remat)
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    batch = {name: jnp.asarray(values) for name, values in make_batch(config).items()}
    program = str(jax.make_jaxpr(lambda model: model(batch, None)[0])(model))
    assert program.count("name=_softmax") == kept  # of the encoder, the decoder and its cross-attention


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 4, 2)])
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(shape: tuple[int, int, int]) -> None:
    model, batch = make_model(ROUTED), make_batch(TINY)
    expected = loss_and_gradients(model, batch, None)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        actual = loss_and_gradients(jax.device_put(model, parameter_shardings(model, mesh)), batch, None)
    # float32 sums in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), actual, expected)
