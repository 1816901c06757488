"""Steps that are not finite stop the run, or are counted up to a limit."""

import pytest

from switchjax.config import TrainConfig, UserError
from switchjax.training.non_finite import NonFiniteError, SkippedSteps

VALUES = {"loss": float("nan"), "total_loss": float("nan"), "learning_rate": 0.1, "parameter_norm": 2.0}
NORMS = {"embedding/vectors": 1.0, "decoder/norm/scale": float("inf"), "logits": float("nan")}


def test_the_run_stops_and_names_the_first_parameter() -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: .*loss nan.*first of 2 parameters .*: decoder/norm/scale"):
        SkippedSteps().count(7, False, VALUES, NORMS, TrainConfig())


def test_steps_are_skipped_until_too_many_come_in_a_row() -> None:
    config = TrainConfig(non_finite="skip", max_skipped_steps=2)
    skipped = SkippedSteps()
    assert "as 1 of this run" in str(skipped.count(1, False, VALUES, NORMS, config))
    assert skipped.count(2, True, VALUES, NORMS, config) is None
    for step in (3, 4):
        assert skipped.count(step, False, VALUES, NORMS, config)
    assert skipped == SkippedSteps(total=3, in_a_row=2)
    with pytest.raises(NonFiniteError, match=r"step 5: .*; 2 steps in a row were skipped before it"):
        skipped.count(5, False, VALUES, NORMS, config)


def test_other_answers_to_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.non_finite: unknown value 'skp' \(did you mean 'skip'\?\)"):
        TrainConfig(non_finite="skp")
