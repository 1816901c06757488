"""Shared experts in addition to routed ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig
from switchjax.moe.layer import MoELayer
from switchjax.moe.shared import SharedMoELayer
from switchjax.parallel.sharding import named_leaves
from tests.moe.layers import LENGTH, D, TinyExpert, make_inputs, run
from tests.parameters import random_parameters


def make(mixing: str, **changes: object) -> SharedMoELayer:
    config = MoEConfig(num_experts=4, group_size=2 * LENGTH, num_shared_experts=1, shared_mixing=mixing, **changes)
    key = jax.random.key(0)
    return random_parameters(
        lambda: SharedMoELayer(
            TinyExpert(0.0, key), MoELayer(partial(TinyExpert, 0.0), D, config, key), D, jax.random.key(1)
        )
    )


def test_the_sum_is_the_shared_network_plus_the_routed_one() -> None:
    layer, (x, mask) = make("sum"), make_inputs()
    y, sums = run(layer, x, mask, None)
    routed, routed_sums = run(layer.routed, x, mask, None)
    # The same additions in a program of another shape.
    np.testing.assert_allclose(y, routed + layer.shared(jnp.asarray(x), None), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, dict(sums), dict(routed_sums))


def test_learned_weights_sum_to_1_and_weigh_each_token() -> None:
    layer, (x, mask) = make("learned"), make_inputs()
    y, _ = run(layer, x, mask, None)
    routed, _ = run(layer.routed, x, mask, None)
    weight = np.asarray(jax.nn.softmax(x @ layer.mixing[...] + layer.mixing_bias[...][None, None], axis=-1))
    assert weight.std() > 0.05
    expected = weight[..., :1] * np.asarray(layer.shared(jnp.asarray(x), None)) + weight[..., 1:] * np.asarray(routed)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_mixing_weights_are_computed_in_full_float32_as_a_routers_logits() -> None:
    # TPUs round what a product of float32 numbers is given, unless it asks for full precision.
    x, mask = map(jnp.asarray, make_inputs())
    programs = [str(jax.make_jaxpr(make(mixing))(x, mask, None)) for mixing in ("sum", "learned")]
    assert [program.count("Precision.HIGHEST, Precision.HIGHEST") for program in programs] == [1, 2]


@pytest.mark.parametrize("mixing", ["sum", "learned"])
def test_a_token_without_a_slot_still_has_its_shared_expert(mixing: str) -> None:
    layer = make(mixing, eval_capacity_factor=0.1, min_expert_capacity=1)
    x, mask = make_inputs()
    y, sums = run(layer, x, mask, None)
    assert sums["dispatched"] < 0.5 * sums["routed"]
    assert np.all(np.any(np.asarray(y)[mask] != 0, axis=-1))


@pytest.mark.parametrize("mixing", ["sum", "learned"])
def test_the_routers_state_moves_under_its_name_in_this_layer(mixing: str) -> None:
    layer, (x, mask) = make(mixing, router="sigmoid"), make_inputs()
    _, sums = run(layer, x, mask, None)
    moved = layer.next_state({"load": sums["load"]})
    assert moved.keys() == {"routed/router/bias"}
    leaves = named_leaves(layer)
    expected = leaves["routed/router/bias"] - 0.001 * np.sign(sums["load"] - np.mean(sums["load"]))
    np.testing.assert_allclose(moved["routed/router/bias"], expected, rtol=1e-6)
    assert np.any(moved["routed/router/bias"] != leaves["routed/router/bias"])
    assert make(mixing).next_state({}) == {}
