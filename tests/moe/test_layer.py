"""The MoE layer on one device: its results, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import UserError
from switchjax.moe.layer import MoELayer
from switchjax.moe.losses import summarize
from tests.moe.layers import (
    LENGTH,
    D,
    expert_slice,
    make_inputs,
    make_layer,
    output_and_sums,
    report_of,
    run,
    run_with_gradients,
    set_experts,
)
from tests.moe.reports import sums_of

DROPLESS = {"train_capacity_factor": 100.0, "eval_capacity_factor": 100.0}
KEY = jax.random.key(7)


def dropped(layer: MoELayer, x: np.ndarray, mask: np.ndarray, key: jax.Array | None) -> float:
    """The fraction of choices that found no slot."""
    return float(summarize(report_of(layer, x, mask, key).metrics).fraction_tokens_dropped)


def test_identical_experts_are_the_dense_layer_times_the_gate() -> None:
    layer, (x, mask) = make_layer(**DROPLESS), make_inputs()
    set_experts(layer, expert_slice(layer, 0))
    y, _ = run(layer, x, mask, None)
    gate = jax.nn.softmax(x @ layer.router["logits"][...], axis=-1).max(axis=-1, keepdims=True)
    dense = expert_slice(layer, 0)(jnp.asarray(x), None)
    # Sums of 16 float32 numbers of about 1, in another order.
    np.testing.assert_allclose(y, np.where(mask[..., None], gate * dense, 0), rtol=1e-5, atol=1e-6)


def test_one_expert_is_the_dense_layer() -> None:
    layer, (x, mask) = make_layer(num_experts=1, jitter_noise=0.1), make_inputs()
    dense = expert_slice(layer, 0)(jnp.asarray(x), None)
    for key in (None, KEY):
        y, _ = run(layer, x, mask, key)
        np.testing.assert_allclose(y, np.where(mask[..., None], dense, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_appended_rows_of_padding_change_nothing(dispatch: str, key: jax.Array | None) -> None:
    layer = make_layer(dispatch=dispatch, jitter_noise=0.1, expert_dropout=0.3)
    x, mask = make_inputs(rows=8)
    more = np.concatenate([x, np.full_like(x, 3.0)])
    padded = np.concatenate([mask, np.zeros_like(mask)])
    (_, (y, sums)), (gradient, dx) = run_with_gradients(layer, x, mask, key)
    (_, (padded_y, padded_sums)), (padded_gradient, padded_dx) = run_with_gradients(layer, more, padded, key)
    for name in ("tokens", "routed", "dispatched", "expert_load"):
        np.testing.assert_array_equal(padded_sums[name], sums[name])
    np.testing.assert_array_equal(padded_y[8:], 0)
    np.testing.assert_array_equal(padded_dx[8:], 0)
    # Programs of other sizes may sum in another order: a few units in the last place of float32. What padding holds
    # is without effect to the last bit, below.
    actual, expected = (padded_y[:8], padded_dx[:8], padded_sums, padded_gradient), (y, dx, sums, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def test_padded_tokens_may_hold_anything() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    (_, (y, sums)), (gradient, _) = run_with_gradients(layer, x, mask, None)
    other = np.where(mask[..., None], x, np.float32(-7))
    (_, (other_y, other_sums)), (other_gradient, _) = run_with_gradients(layer, other, mask, None)
    np.testing.assert_array_equal(other_y, y)
    jax.tree.map(np.testing.assert_array_equal, dict(other_sums), dict(sums))
    jax.tree.map(np.testing.assert_array_equal, other_gradient, gradient)


def test_evaluation_has_no_noise_and_training_has() -> None:
    x, mask = make_inputs()
    noisy = make_layer(jitter_noise=0.5, expert_dropout=0.5, train_capacity_factor=2.0)
    quiet = make_layer(jitter_noise=0.0, expert_dropout=0.0, train_capacity_factor=2.0)
    evaluated, _ = run(noisy, x, mask, None)
    np.testing.assert_array_equal(evaluated, run(quiet, x, mask, None)[0])
    np.testing.assert_array_equal(evaluated, run(quiet, x, mask, KEY)[0])
    trained, _ = run(noisy, x, mask, KEY)
    np.testing.assert_array_equal(trained, run(noisy, x, mask, KEY)[0])
    assert not np.allclose(trained, evaluated)
    assert not np.allclose(trained, run(noisy, x, mask, jax.random.key(8))[0])


@pytest.mark.parametrize("noise", [{"jitter_noise": 0.5}, {"expert_dropout": 0.5}])
def test_each_group_has_its_own_noise(noise: dict[str, float]) -> None:
    layer = make_layer(group_size=LENGTH, jitter_noise=0.0, **DROPLESS)
    noisy = make_layer(group_size=LENGTH, **({"jitter_noise": 0.0} | noise), **DROPLESS)
    x, mask = np.ones((2, LENGTH, D), np.float32), np.ones((2, LENGTH), bool)
    np.testing.assert_array_equal(*run(layer, x, mask, KEY)[0])
    assert not np.allclose(*run(noisy, x, mask, KEY)[0])


def test_training_and_evaluation_have_their_own_capacity() -> None:
    layer = make_layer(train_capacity_factor=0.5, eval_capacity_factor=100.0, jitter_noise=0.0)
    x, mask = make_inputs()
    fractions = [dropped(layer, x, mask, key) for key in (KEY, None)]
    assert fractions[0] > 0.2
    assert fractions[1] == 0


def test_einsum_and_gather_dispatch_agree_in_outputs_and_gradients() -> None:
    x, mask = make_inputs()
    gather, einsum = (
        run_with_gradients(make_layer(dispatch=form, train_capacity_factor=0.75), x, mask, KEY)
        for form in ("gather", "einsum")
    )
    # The layers' static configs differ, so leaf by leaf; float32 sums in another order.
    for a, b in zip(jax.tree.leaves(gather), jax.tree.leaves(einsum), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_routes_as_its_float32_router() -> None:
    layer, (x, mask) = make_layer(num_experts=16), make_inputs(rows=64)
    low = jnp.asarray(x).astype(jnp.bfloat16)
    exact = jnp.einsum("bld,de->ble", low.astype(jnp.float32), layer.router["logits"][...])
    rounded = jnp.einsum("bld,de->ble", low, layer.router["logits"][...].astype(jnp.bfloat16))
    assert np.any(exact.argmax(axis=-1) != rounded.argmax(axis=-1)), "nothing here tells the two apart"

    layer.experts = jax.tree.map(lambda values: values.astype(jnp.bfloat16), layer.experts)
    y, sums = run(layer, low, mask, None)
    assert y.dtype == jnp.bfloat16
    load = np.bincount(np.asarray(exact.argmax(axis=-1))[mask], minlength=16)
    np.testing.assert_array_equal(sums["expert_load"], load)
    assert all(values.dtype == jnp.float32 for values in sums.values())


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_huge_inputs_and_idle_experts_give_finite_values_and_gradients(dispatch: str) -> None:
    layer = make_layer(num_experts=8, dispatch=dispatch)
    layer.router["logits"][...] = (
        jnp.zeros_like(layer.router["logits"][...]).at[:, 3].set(1.0)
    )  # every token goes to expert 3
    x, mask = np.full((4, LENGTH, D), 1e15, np.float32), np.ones((4, LENGTH), bool)

    def loss(layer: object, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, sums = output_and_sums(layer, x, jnp.asarray(mask), None)
        return jnp.sum(y) + sums["load_balance_loss"], sums

    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layer, x)
    assert np.count_nonzero(sums["expert_load"]) == 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, sums, gradients)))
    idle = np.delete(np.asarray(gradients[0].experts.w_out[...]), 3, axis=0)
    np.testing.assert_array_equal(idle, 0)


def test_a_token_over_capacity_comes_back_as_zeros() -> None:
    layer = make_layer(group_size=LENGTH, eval_capacity_factor=0.1, min_expert_capacity=3)
    layer.router["logits"][...] = jnp.zeros_like(
        layer.router["logits"][...]
    )  # all probabilities equal: all to expert 0
    x, mask = np.ones((1, LENGTH, D), np.float32), np.ones((1, LENGTH), bool)
    y, _ = run(layer, x, mask, None)
    assert np.all(np.asarray(y)[0, :3] != 0)
    np.testing.assert_array_equal(y[0, 3:], 0)
    assert dropped(layer, x, mask, None) == (LENGTH - 3) / LENGTH


def test_only_tokens_of_the_same_group_can_crowd_a_token_out() -> None:
    layer = make_layer(group_size=2 * LENGTH, eval_capacity_factor=0.5)
    x, mask = make_inputs(rows=4)
    y, _ = run(layer, x, mask, None)
    other = np.concatenate([x[:2], x[1:2], x[:1]])  # rows 2 and 3 replaced
    np.testing.assert_array_equal(run(layer, other, mask, None)[0][:2], y[:2])


def test_slots_may_be_a_number_for_each_row() -> None:
    x, mask = make_inputs()
    by_number = make_layer(group_size=0, expert_capacity=3)
    by_factor = make_layer(group_size=LENGTH, eval_capacity_factor=0.1, min_expert_capacity=3)
    np.testing.assert_array_equal(*(run(layer, x, mask, None)[0] for layer in (by_number, by_factor)))
    assert dropped(by_number, x, mask, None) > 0


def test_a_group_size_that_cuts_rows_unevenly_is_refused() -> None:
    x, mask = make_inputs()
    with pytest.raises(UserError, match=r"group_size=3 neither divides a row of 8 tokens"):
        run(make_layer(group_size=3), x, mask, None)


def test_the_report_names_its_sums_and_those_of_groups_add_up() -> None:
    x, mask = make_inputs()
    layer = make_layer(router="reinforced", group_size=LENGTH)
    whole, rows = (
        report_of(layer, x, mask, None),
        [report_of(layer, x[i : i + 1], mask[i : i + 1], None) for i in (0, 1)],
    )
    assert whole.losses.keys() == {"load_balance_loss", "router_z_loss", "policy_entropy_loss"}
    assert whole.token_values.keys() == {"log_policy", "baseline"}
    assert whole.state_sums == {}
    assert whole.layers == ()
    assert all(loss.shape == () for loss in whole.losses.values())
    both = report_of(layer, x[:2], mask[:2], None)
    added = jax.tree.map(jnp.add, *map(sums_of, rows))
    # float32 sums of two groups.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums_of(both), added)
    for name, values in both.token_values.items():
        assert values.shape == mask[:2].shape
        for row in (0, 1):
            np.testing.assert_allclose(values[row], rows[row].token_values[name][0], rtol=1e-6, atol=1e-6)


def test_a_router_without_state_moves_nothing() -> None:
    assert make_layer().next_state({}) == {}
    assert make_layer(router="reinforced").next_state({}) == {}
