"""Steps that are not finite stop the run, or are counted up to a limit."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from switchjax.config import MeshConfig, TrainConfig, UserError
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, with_leaves
from switchjax.training.non_finite import NonFiniteError, SkippedSteps
from switchjax.training.state import plan_state
from switchjax.training.step import train_step
from tests.models.families import FAMILIES, make_batch
from tests.tiny import changed

VALUES = {"loss": float("nan"), "total_loss": float("nan"), "learning_rate": 0.1, "parameter_norm": 2.0}
NORMS = {"embedding/vectors": 1.0, "decoder/norm/scale": float("inf"), "logits": float("nan")}


def test_the_run_stops_and_names_the_first_parameter() -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: .*loss nan.*first of 2 parameters .*: decoder/norm/scale"):
        SkippedSteps().count(7, False, VALUES, NORMS, TrainConfig())


def test_steps_are_skipped_until_too_many_come_in_a_row() -> None:
    config = TrainConfig(non_finite="skip", max_skipped_steps=2)
    skipped = SkippedSteps()
    assert "skipped: 1 in this run" in str(skipped.count(1, False, VALUES, NORMS, config))
    assert skipped.count(2, True, VALUES, NORMS, config) is None
    for step in (3, 4):
        assert skipped.count(step, False, VALUES, NORMS, config)
    assert skipped == SkippedSteps(total=3, in_a_row=2)
    with pytest.raises(NonFiniteError, match=r"step 5: .*; 2 steps in a row were skipped before it"):
        skipped.count(5, False, VALUES, NORMS, config)


def test_other_answers_to_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.non_finite: unknown value 'skp' \(did you mean 'skip'\?\)"):
        TrainConfig(non_finite="skp")


def test_a_skipped_step_leaves_all_of_the_state_but_its_step() -> None:
    """Parameters, both moments and the router's bias stay equal to the bit; the next finite step moves them."""
    config = changed(
        FAMILIES["glam"],
        model={"num_decoder_layers": 1, "pattern": ("moe",)},
        moe={"router": "sigmoid"},
        optimizer={"name": "adamw", "schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1},
        train={"non_finite": "skip"},
    )
    mesh, batch = make_mesh(MeshConfig(), jax.devices()[:1]), make_batch(config)
    with jax.set_mesh(mesh):
        plan = plan_state(config, mesh)
        step = jax.jit(partial(train_step, config=config, optimizer=plan.optimizer))
        good, metrics = step(plan.create(), batch)
        assert metrics["finite"]
        # Finite parameters whose logits are not.
        poisoned = {
            n: leaf * 3e38 if n == "decoder/norm/scale" else leaf for n, leaf in named_leaves(good.model).items()
        }
        before = dataclasses.replace(good, model=with_leaves(good.model, poisoned))
        after, metrics = step(before, batch)
        assert not metrics["finite"]
        healed = dataclasses.replace(after, model=good.model)
        moved, metrics = step(healed, batch)
        assert metrics["finite"]
    assert (before.step, after.step) == (1, 2)
    old, new, next_ = (jax.tree.leaves((state.model, state.opt_state)) for state in (before, after, moved))
    for one, other in zip(old, new, strict=True):
        assert np.all(np.isfinite(one))
        np.testing.assert_array_equal(one, other)
    same = [np.array_equal(one, other) for one, other in zip(new, next_, strict=True)]
    assert sum(same) < 0.1 * len(same)
