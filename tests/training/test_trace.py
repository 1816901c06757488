"""A trace holds the requested steps, in the form that xprof reads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from switchjax.config import TrainConfig
from switchjax.training.trace import Trace


def traced_steps(workdir: Path) -> dict[str, list[int]]:
    """A dict from the name of each trace to the numbers of its steps, read from its annotations."""
    found = {}
    for path in (workdir / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = (event for plane in planes for line in plane.lines for event in line.events if event.name == "train")
        found[path.parent.name] = sorted(int(dict(event.stats)["step_num"]) for event in events)
    return found


def run(trace: Trace, numbers: range) -> None:
    step = jax.jit(lambda x: x + 1)
    state = jnp.zeros(())
    for number in numbers:
        with trace.step(number):
            state = step(state)
        trace.stop_after(number, state)
    trace.close()


def test_only_the_steps_that_were_asked_for_are_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run(Trace(tmp_path, TrainConfig(trace_first_step=2, trace_steps=3)), range(1, 8))
    assert traced_steps(tmp_path) == {"step_2": [2, 3, 4]}
    assert f"trace of steps 2 to 4 in {tmp_path}/tensorboard/plugins/profile/step_2" in caplog.text
    assert f"xprof --logdir={tmp_path}/tensorboard" in caplog.text


def test_a_run_that_begins_or_ends_within_the_trace_has_its_part_of_it(tmp_path: Path) -> None:
    run(Trace(tmp_path, TrainConfig(trace_first_step=2, trace_steps=3)), range(1, 4))
    run(Trace(tmp_path, TrainConfig(trace_first_step=2, trace_steps=3)), range(4, 8))
    assert traced_steps(tmp_path) == {"step_2": [2, 3], "step_4": [4]}


def test_nothing_is_traced_unless_asked(tmp_path: Path) -> None:
    run(Trace(tmp_path, TrainConfig()), range(1, 20))
    run(Trace(tmp_path, TrainConfig(trace_first_step=30, trace_steps=3)), range(1, 20))
    assert not list(tmp_path.iterdir())
