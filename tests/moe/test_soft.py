"""Soft MoE equals loops in float64, ignores padding and other rows, and is the same on every mesh."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import KINDS, MeshConfig, MoEConfig, UserError
from switchjax.moe.routing import RoutingReport
from switchjax.moe.soft import SoftMoELayer, soft_weights
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, parameter_shardings, partition_spec
from switchjax.planning.hlo_collectives import count_collectives
from tests.moe.layers import LENGTH, D, TinyExpert, make_inputs
from tests.parameters import random_parameters

KEY = jax.random.key(7)
SLOTS = 3


def make_layer(experts: int = 4, slots: int = SLOTS, dropout: float = 0.0) -> SoftMoELayer:
    """A layer of tiny experts, whose softmaxes are far from uniform."""
    make_expert = partial(TinyExpert, dropout)
    config = MoEConfig(num_experts=experts, expert_dropout=dropout, options={"slots_per_expert": slots})
    layer = random_parameters(lambda: SoftMoELayer(make_expert, D, config, jax.random.key(0)))
    layer.phi_scale[...] += 3
    return layer


def loss_and_output(layer: SoftMoELayer, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> Any:
    y, _ = layer(x, mask, key)
    return jnp.sum(jnp.sin(y)), y


run = jax.jit(lambda layer, x, mask, key: layer(x, mask, key)[0])
run_with_gradients = jax.jit(jax.value_and_grad(loss_and_output, argnums=(0, 1), has_aux=True))


def soft_oracle(weights: Mapping[str, np.ndarray], x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Outputs [B, L, D] in float64: row by row, slot by slot."""
    phi = weights["phi"]
    slots = list(product(*(range(size) for size in phi.shape[1:])))
    y = np.zeros_like(x)
    for row, real, out in zip(x, mask, y, strict=True):
        tokens = row[real]
        logits = np.zeros((len(tokens), len(slots)))
        for t, (s, (e, p)) in product(range(len(tokens)), enumerate(slots)):
            direction = phi[:, e, p] / np.linalg.norm(phi[:, e, p])
            logits[t, s] = weights["phi_scale"] * direction @ tokens[t] / np.linalg.norm(tokens[t])
        exp = np.exp(logits)
        dispatch, combine = exp / exp.sum(axis=0), exp / exp.sum(axis=1, keepdims=True)
        outputs = np.zeros_like(tokens)
        for s, (e, _) in enumerate(slots):
            hidden = np.tanh(dispatch[:, s] @ tokens @ weights["experts/w_in"][e])
            outputs += combine[:, s, None] * (hidden @ weights["experts/w_out"][e])
        out[real] = outputs
    return y


def test_the_layer_and_its_gradients_are_those_of_the_loop() -> None:
    layer, (x, mask) = make_layer(), make_inputs(rows=3)
    (_, y), (gradient, dx) = run_with_gradients(layer, x, mask, None)
    at = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(layer).items()} | {"x": x.astype(float)}
    # float32 sums of some 10 numbers of about 1.
    np.testing.assert_allclose(y, soft_oracle(at, at["x"], mask), rtol=1e-4, atol=1e-5)

    rng, step = np.random.default_rng(1), 1e-6
    gradients = {**named_leaves(gradient), "x": dx}
    assert gradients.keys() == {"phi", "phi_scale", "experts/w_in", "experts/w_out", "x"}
    for name, values in gradients.items():
        direction = rng.normal(size=at[name].shape)
        ahead, behind = (
            np.sin(soft_oracle(moved, moved["x"], mask)).sum()
            for moved in (at | {name: at[name] + sign * step * direction} for sign in (1, -1))
        )
        actual = np.sum(np.asarray(values, np.float64) * direction)
        # Gradients in float32, sums of up to a thousand terms of about 1.
        np.testing.assert_allclose(actual, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-4, err_msg=name)


def test_dispatch_sums_to_one_over_tokens_and_combine_over_slots() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    mask[3] = False
    dispatch, combine = jax.jit(soft_weights)(x, mask, layer.phi[...], layer.phi_scale[...])
    # Sums of about 10 float32 numbers.
    any_token = np.broadcast_to(mask.any(axis=1)[:, None, None], (len(x), 4, SLOTS))
    np.testing.assert_allclose(np.sum(dispatch, axis=1), any_token, rtol=1e-6)
    np.testing.assert_allclose(np.sum(combine, axis=(2, 3)), mask, rtol=1e-6)
    for weights in (np.asarray(dispatch), np.asarray(combine)):
        np.testing.assert_array_equal(weights[~mask], 0)
    # Only the directions of tokens and slots count (section 2.3).
    other = jax.jit(soft_weights)(100 * x, mask, 0.01 * layer.phi[...], layer.phi_scale[...])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, (dispatch, combine))


def test_padding_takes_part_in_nothing() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    mask[3] = False  # a row of padding alone
    expected = run_with_gradients(layer, x, mask, None)
    (_, y), (gradient, dx) = expected
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradient, dx)))
    np.testing.assert_array_equal(np.asarray(y)[~mask], 0)
    np.testing.assert_array_equal(np.asarray(dx)[~mask], 0)
    for value in (0, -7, np.nan):
        other = np.where(mask[..., None], x, np.float32(value))
        jax.tree.map(np.testing.assert_array_equal, run_with_gradients(layer, other, mask, None), expected)
    # Columns of padding added; sums over another length may be taken in another order.
    wide, wide_mask = np.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=2.0), np.pad(mask, ((0, 0), (0, 3)))
    np.testing.assert_allclose(run(layer, wide, wide_mask, None)[:, :LENGTH], y, rtol=1e-5, atol=1e-6)


def test_a_row_knows_of_no_other_but_its_tokens_know_of_those_after_them() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    y = run(layer, x, mask, None)
    other = x.copy()
    other[1:] = 1.0
    np.testing.assert_array_equal(run(layer, other, mask, None)[0], y[0])
    other[0, LENGTH // 2 - 1] = 1.0
    assert not np.allclose(run(layer, other, mask, None)[0, 0], y[0, 0])
    assert KINDS["soft"].families == ("vision",)  # where every token is there from the start


def test_the_order_of_tokens_does_not_matter() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    backwards = run(layer, x[:, ::-1], mask[:, ::-1], None)
    np.testing.assert_allclose(np.asarray(backwards)[:, ::-1], run(layer, x, mask, None), rtol=1e-5, atol=1e-6)


def test_identical_experts_are_one_expert_with_all_the_slots() -> None:
    many, one, (x, mask) = make_layer(), make_layer(experts=1, slots=4 * SLOTS), make_inputs()
    one.phi_scale[...] = many.phi_scale[...]
    one.phi[...] = many.phi[...].reshape(D, 1, 4 * SLOTS)
    for name in ("w_in", "w_out"):
        weight = getattr(many.experts, name)
        weight[...] = jnp.broadcast_to(getattr(one.experts, name)[...], weight.shape)
    np.testing.assert_allclose(run(many, x, mask, None), run(one, x, mask, None), rtol=1e-5, atol=1e-6)


def test_one_slot_gives_every_token_the_expert_of_the_mixture() -> None:
    layer, (x, mask) = make_layer(experts=1, slots=1), make_inputs()
    y = run(layer, x, mask, None)
    np.testing.assert_array_equal(y, np.where(mask[..., None], y[:, :1], 0))


def test_a_bfloat16_model_is_finite_and_has_float32_softmaxes() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    layer.phi_scale[...] *= 20  # close to one-hot
    low = jnp.asarray(x).astype(jnp.bfloat16)
    weights, exact = (
        jax.jit(soft_weights)(tokens, mask, layer.phi[...], layer.phi_scale[...])
        for tokens in (low, low.astype(jnp.float32))
    )
    jax.tree.map(np.testing.assert_array_equal, weights, exact)
    assert all(weight.dtype == jnp.float32 for weight in weights)

    expected = run(layer, low.astype(jnp.float32), mask, None)
    layer.experts = jax.tree.map(lambda values: values.astype(jnp.bfloat16), layer.experts)
    (_, y), gradients = run_with_gradients(layer, low, mask, None)
    assert y.dtype == jnp.bfloat16
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    # Three products of 8 bits, sums of 8 to 16 numbers below 1.
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_dropout_is_off_in_evaluation_and_each_rows_own_in_training() -> None:
    noisy, quiet, (x, mask) = make_layer(dropout=0.5), make_layer(), make_inputs()
    evaluated = run(noisy, x, mask, None)
    np.testing.assert_array_equal(evaluated, run(quiet, x, mask, KEY))
    same_rows = np.broadcast_to(x[:1], x.shape), np.broadcast_to(mask[:1], mask.shape)
    trained = run(noisy, *same_rows, KEY)
    assert not np.allclose(trained[0], evaluated[0])
    assert not np.allclose(trained[0], trained[1])


def placed_on(mesh: jax.sharding.Mesh, layer: SoftMoELayer, x: np.ndarray, mask: np.ndarray) -> tuple[Any, ...]:
    batch = NamedSharding(mesh, partition_spec("batch"))
    return jax.device_put(layer, parameter_shardings(layer, mesh)), *jax.device_put((x, mask), batch)


@pytest.mark.parametrize(
    ("shape", "experts", "dropout"), [((2, 4, 1), 4, 0.3), ((1, 8, 1), 8, 0.0), ((2, 2, 2), 4, 0.0)]
)
def test_outputs_and_gradients_on_a_mesh_are_those_of_one_device(
    shape: tuple[int, int, int], experts: int, dropout: float
) -> None:
    layer, (x, mask) = make_layer(experts, dropout=dropout), make_inputs()
    expected = run_with_gradients(layer, x, mask, KEY)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        placed = placed_on(mesh, layer, x, mask)
        program = run_with_gradients.lower(*placed, KEY).compile()
        actual = program(*placed, KEY)
    # float32 sums over 128 tokens, in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), actual, expected)
    counts = count_collectives(program)
    assert counts.pop("all-to-all") == 4
    assert counts.keys() <= {"all-reduce"}


def test_experts_that_no_axis_slices_are_not_added_up_over_model() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    for weight in (layer.experts.w_in, layer.experts.w_out):
        weight.set_metadata(axes=("expert", "embed", None))
    expected = run(layer, x, mask, None)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        actual = run(*placed_on(mesh, layer, x, mask), None)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-5)


def test_forwards_there_are_2_all_to_alls_and_nothing_else() -> None:
    mesh = make_mesh(MeshConfig(2, 4, 1))
    with jax.set_mesh(mesh):
        compiled = run.lower(*placed_on(mesh, make_layer(), *make_inputs()), None).compile()
    counts = count_collectives(compiled)
    assert counts.pop("all-to-all") == 2
    assert counts.keys() <= {"all-reduce"}


def test_rows_that_do_not_divide_over_the_mesh_are_refused() -> None:
    mesh = make_mesh(MeshConfig(2, 4, 1))
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"6 rows do not divide over the 8 shards"):
        run(make_layer(), *make_inputs(rows=6), None)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_nothing_is_chosen_so_nothing_is_reported_or_moved(key: jax.Array | None) -> None:
    layer, (x, mask) = make_layer(), make_inputs(rows=2)
    _, report = layer(jnp.asarray(x), jnp.asarray(mask), key)
    assert report == RoutingReport()
    assert jax.tree.leaves(report) == []
    assert layer.next_state({}) == {}


def test_an_expert_has_one_slot_unless_told() -> None:
    config = MoEConfig(num_experts=4)
    layer = random_parameters(lambda: SoftMoELayer(partial(TinyExpert, 0.0), D, config, KEY))
    assert layer.phi.shape == (D, 4, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slot_per_expert": 2}, r"'moe\.options\.slot_per_expert' \(did you mean 'slots_per_expert'\?\)"),
        ({"slots_per_expert": "2"}, r"moe\.options\.slots_per_expert must be of type int, got '2'"),
        ({"slots_per_expert": 0}, r"moe\.options\.slots_per_expert must be positive, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SoftMoELayer(partial(TinyExpert, 0.0), D, MoEConfig(num_experts=4, options=options), KEY)
