"""The objective in closed form, and the rewards and losses of reinforced routing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, MoEConfig, TrainConfig, UserError
from switchjax.models.families import build
from switchjax.moe.routers.reinforced import policy_loss
from switchjax.moe.routing import RoutingReport
from switchjax.training.objective import (
    Counts,
    Sums,
    count_batch,
    objective,
    rewards_of_segments,
    sum_over_targets,
    target_log_probs,
    with_reward_losses,
)
from tests.models import examples, families


def report(layers: tuple[int, ...], **losses: Any) -> RoutingReport:
    return RoutingReport({name: jnp.asarray(values) for name, values in losses.items()}, layers=layers)


THREE_LAYERS = {
    # Two layers of an encoder of 10 tokens, one of a decoder of 5.
    "encoder/scans/0/blocks/1/ff": report((1, 3), load_balance_loss=[12.0, 18.0], router_z_loss=[4.0, 6.0]),
    "decoder/scans/0/blocks/1/ff": report((1,), load_balance_loss=[10.0], router_z_loss=[5.0]),
}
SUMS = Sums(nll=jnp.asarray(8.0), z_loss=jnp.asarray(20.0), correct=jnp.asarray(1), reports=THREE_LAYERS)
COUNTS = Counts(jnp.asarray(4), {"encoder": jnp.asarray(10), "decoder": jnp.asarray(5)})


def test_the_objective_of_three_layers_in_closed_form() -> None:
    config = Config(
        moe=MoEConfig(loss_weights={"load_balance_loss": 0.1, "router_z_loss": 0.01}),
        train=TrainConfig(z_loss_weight=0.001),
    )
    terms = objective(config, SUMS, COUNTS)
    assert terms.loss == pytest.approx(2.0)
    assert terms.z_loss == pytest.approx(5.0)
    assert terms.routing["load_balance_loss"] == pytest.approx((1.2 + 1.8 + 2.0) / 3)
    assert terms.routing["router_z_loss"] == pytest.approx((0.4 + 0.6 + 1.0) / 3)
    assert terms.total == pytest.approx(2.0 + 0.001 * 5.0 + 0.1 * 5.0 / 3 + 0.01 * 2.0 / 3)


def test_weights_that_a_config_leaves_out_are_the_routers_own() -> None:
    terms = objective(Config(train=TrainConfig(z_loss_weight=0.0)), SUMS, COUNTS)
    assert terms.total == pytest.approx(2.0 + 0.01 * 5.0 / 3)  # load balance 0.01, router z-loss 0


def test_contributions_of_micro_batches_add_up_to_the_objective() -> None:
    half = jax.tree.map(lambda values: values / 2 if values.dtype == jnp.float32 else values, SUMS)
    config = Config(moe=MoEConfig(loss_weights={"router_z_loss": 0.5}))
    whole, part = (objective(config, sums, COUNTS) for sums in (SUMS, half))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_allclose(a, 2 * b, rtol=1e-6)


def test_nothing_to_count_divides_by_one() -> None:
    empty = jax.tree.map(jnp.zeros_like, (SUMS, COUNTS))
    assert all(value == 0 for value in jax.tree.leaves(objective(Config(), *empty)))


def test_a_weight_for_a_loss_that_the_router_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"no loss 'importance_loss'"):
        objective(Config(moe=MoEConfig(loss_weights={"importance_loss": 0.1})), SUMS, COUNTS)


def test_log_probabilities_by_hand() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[1.0, 2.0, 5.0], [1 / 3] * 3]], np.float32))
    log_probs, log_z = target_log_probs(jnp.asarray(logits), jnp.array([[0, 1], [2, 0]]))
    np.testing.assert_allclose(log_probs, np.log([[0.5, 0.8], [5 / 8, 1 / 3]]), rtol=1e-6)
    np.testing.assert_allclose(log_z, [[0, 0], [np.log(8.0), 0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (examples.TINY, examples.make_batch()),
        (families.FAMILIES["v_moe"], families.make_batch(families.FAMILIES["v_moe"])),
    ],
    ids=["encoder-decoder", "vision"],
)
def test_sums_over_targets_are_those_of_the_models_logits(config: Config, batch: dict[str, np.ndarray]) -> None:
    model = build(config, jax.random.key(0))
    (logits, _), sums, counts = jax.jit(
        lambda model, batch: (
            model(batch, None),
            sum_over_targets(config, model, batch, None),
            count_batch(model, batch),
        )
    )(model, batch)
    targets, segments = model.targets({name: jnp.asarray(rows) for name, rows in batch.items()})
    real = np.asarray(segments) > 0
    wide = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(wide).sum(axis=-1))
    chosen = np.take_along_axis(wide, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sums.nll, (log_z - chosen)[real].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.z_loss, (log_z**2)[real].sum(), rtol=1e-5)
    assert sums.correct == np.sum((wide.argmax(axis=-1) == np.asarray(targets))[real])
    assert counts.targets == real.sum()
    for stack, tokens in model.segments({name: jnp.asarray(rows) for name, rows in batch.items()}).items():
        assert counts.tokens[stack] == np.sum(np.asarray(tokens) > 0)


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0]])
TARGET_SEGMENTS = np.array([[1, 2, 2, 0], [1, 1, 2, 0], [0, 0, 0, 0]])  # the third of the second row was cut off
REINFORCED = Config(moe=MoEConfig(router="reinforced"))


def test_an_encoder_token_earns_the_mean_log_probability_of_its_own_sequence() -> None:
    log_probs = np.random.default_rng(0).normal(size=TARGET_SEGMENTS.shape).astype(np.float32)
    expected = np.zeros(SEGMENTS.shape)
    for row, token in np.ndindex(*SEGMENTS.shape):
        own = log_probs[row][TARGET_SEGMENTS[row] == SEGMENTS[row, token]]
        if SEGMENTS[row, token] and len(own):
            expected[row, token] = own.mean(dtype=np.float64)
    rewards = jax.jit(rewards_of_segments)(log_probs, TARGET_SEGMENTS, SEGMENTS)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_values_of_tokens_give_way_to_a_loss_of_each_layer() -> None:
    rng = np.random.default_rng(0)
    log_probs = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    segments = {"encoder": jnp.asarray(SEGMENTS), "decoder": jnp.asarray(TARGET_SEGMENTS)}
    values = {
        stack: {name: jnp.asarray(rng.normal(size=(2, 3, length)), jnp.float32) for name in ("log_policy", "baseline")}
        for stack, length in (("encoder", 6), ("decoder", 4))
    }
    reports = {
        f"{stack}/ff": RoutingReport({"router_z_loss": jnp.ones(2)}, token_values=values[stack]) for stack in values
    }
    found = with_reward_losses(REINFORCED, reports, log_probs, segments["decoder"], segments)
    encoder_rewards = rewards_of_segments(log_probs, segments["decoder"], segments["encoder"])
    for stack, reward in (("encoder", encoder_rewards), ("decoder", log_probs)):
        losses = found[f"{stack}/ff"].losses
        assert losses.keys() == {"router_z_loss", "policy_loss"}
        expected = policy_loss(values[stack], reward, segments[stack] > 0)["policy_loss"]
        np.testing.assert_allclose(losses["policy_loss"], expected, rtol=1e-6)
        assert found[f"{stack}/ff"].token_values == {}


def test_reports_of_other_routers_are_left_alone() -> None:
    segments = jnp.asarray(TARGET_SEGMENTS)
    found = with_reward_losses(Config(), THREE_LAYERS, jnp.zeros((3, 4)), segments, {"decoder": segments})
    assert found == THREE_LAYERS
