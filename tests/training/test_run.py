"""A run resumes to the bit after any interruption, and refuses what it cannot continue."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from switchjax.accounting import utilization
from switchjax.config import Config, UserError, load_workdir_config
from switchjax.data.sources import SOURCES
from switchjax.data.text import TextData
from switchjax.models.families import with_all_options
from switchjax.models.model import Model
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.training import run
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.evaluation import Evaluator
from switchjax.training.metrics import read_metrics
from switchjax.training.non_finite import NonFiniteError
from switchjax.training.run import train
from switchjax.training.state import plan_state
from tests.stories import small_source
from tests.tiny import changed, losses
from tests.training.test_trace import traced_steps


@pytest.fixture(scope="module")
def complete(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an undisturbed run of 6 steps, on devices with a peak of 1e12 FLOP/s."""
    workdir = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilization, "peak_flops", lambda kind: 1e12)
        train(tiny, workdir)
    return workdir


def test_a_complete_run_leaves_everything_in_its_workdir(tiny: Config, complete: Path) -> None:
    assert Config.from_json((complete / "config.json").read_text()) == with_all_options(tiny)
    summary = json.loads((complete / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["evaluation"]["neg_log_perplexity"] < 0
    assert set(summary["corpora"]) == {"tales", "yarns"}
    assert Checkpoints(complete).steps() == [4, 6]
    assert list(losses(complete)) == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in read_metrics(complete, "evaluate")] == [3, 6]


def test_every_record_holds_the_metrics_that_are_promised(tiny: Config, complete: Path) -> None:
    promised = {"loss", "load_balance_loss", "fraction_tokens_dropped", "expert_load", "router_entropy"}
    promised |= {"router_confidence", "gradient_norm", "parameter_norm", "learning_rate", "tokens_per_second"}
    for record in read_metrics(complete, "train"):
        assert promised <= set(record)
        assert np.shape(record["expert_load"]) == (2, tiny.moe.num_experts)
        assert record["mfu"] == pytest.approx(record["model_flops_per_second"] / 8e12)
        parts = [record[f"{part}_fraction"] for part in ("data_wait", "step", "logging", "evaluation", "checkpoint")]
        assert min(parts) >= 0
        assert sum(parts) <= 1
    # The checkpoint of step 2 and the evaluation of step 3 are part of what follows.
    third, fourth = read_metrics(complete, "train")[2:4]
    assert third["checkpoint_fraction"] > 0 == third["evaluation_fraction"]
    assert fourth["evaluation_fraction"] > 0 == fourth["checkpoint_fraction"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(
    tiny: Config, complete: Path, tmp_path: Path
) -> None:
    train(tiny, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(complete)
    train(changed(tiny, train={"seed": 1, "steps": 2}), tmp_path / "other")
    assert losses(tmp_path / "other")[2] != losses(complete)[2]


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_last_checkpoint_bit_for_bit_traced_or_not(
    tiny: Config, complete: Path, tmp_path: Path
) -> None:
    short = changed(tiny, train={"steps": 3, "trace_first_step": 2, "trace_steps": 5})
    train(short, tmp_path)
    assert traced_steps(tmp_path) == {"step_2": [2, 3]}
    train(tiny, tmp_path)
    assert losses(tmp_path) == losses(complete)


def test_a_complete_run_started_again_does_nothing_but_say_so(tiny: Config, complete: Path) -> None:
    before = (complete / "metrics.jsonl").read_text()
    assert train(tiny, complete)["steps"] == 6
    assert (complete / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_with_the_key_that_differs(tiny: Config, complete: Path) -> None:
    with pytest.raises(UserError, match=r"moe\.num_experts: 4 -> 8"):
        train(changed(tiny, moe={"num_experts": 8}), complete)


def test_what_does_not_change_a_step_may_change_and_a_start_that_failed_leaves_nothing_in_the_way(
    tiny: Config, complete: Path, tmp_path: Path
) -> None:
    assert train(changed(tiny, train={"log_every": 2}), complete)["steps"] == 6
    with pytest.raises(UserError, match="unknown value 'swich'"):
        train(changed(tiny, moe={"router": "swich"}), tmp_path)
    assert train(changed(tiny, train={"steps": 1}), tmp_path)["steps"] == 1


def test_other_data_is_refused_and_leaves_the_vocabulary_of_the_run(tiny: Config, tmp_path: Path) -> None:
    short = changed(tiny, train={"steps": 1})
    train(short, tmp_path)
    before = (tmp_path / "vocabulary.model").read_bytes()
    # One of the corpora is unavailable, as on another machine.
    config_path = tmp_path / "config.json"
    fewer = changed(tiny, data={"corpora": ("tales",)})
    config_path.write_text(fewer.to_json())
    with pytest.raises(UserError, match="corpora or vocabulary have changed"):
        train(fewer, tmp_path)
    assert (tmp_path / "vocabulary.model").read_bytes() == before


@pytest.mark.slow
def test_a_run_keeps_to_the_corpora_that_it_was_begun_with(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"corpora": ("lost", "tales"), "rates": (0.9, 0.1), "directory": str(tmp_path / "data")}
    config = changed(tiny, data=data, train={"steps": 1})
    workdir = tmp_path / "run"
    train(config, workdir)
    saved = load_workdir_config(workdir).data
    assert (saved.corpora, saved.rates) == (("tales",), (0.1,))

    monkeypatch.setitem(SOURCES, "lost", small_source("lost", 2000))  # now it is available
    longer = changed(config, train={"steps": 2})
    assert train(longer, workdir)["corpora"] == ["tales"]
    assert list(losses(workdir)) == [1, 2]
    assert f"{workdir} started without lost and continues without" in caplog.messages
    assert train(longer, tmp_path / "other")["corpora"] == ["lost", "tales"]

    with pytest.raises(UserError, match=r"data\.rates: \(0\.1,\) -> \(0\.2,\)"):
        train(changed(longer, data={"rates": (0.8, 0.2)}), workdir)
    with pytest.raises(UserError, match=r"it was trained with data\.corpora=\('lost', 'tales'\)"):
        train(changed(longer, data={"corpora": ("tales",), "rates": (0.1,)}), tmp_path / "other")


def test_the_objective_is_not_changed_half_way(tiny: Config, complete: Path) -> None:
    with pytest.raises(UserError, match=r"train\.z_loss_weight"):
        train(changed(tiny, train={"z_loss_weight": 0.5}), complete)


@pytest.fixture(scope="module")
def wild(tiny: Config) -> Config:
    """A config whose first AdamW step takes the parameters to 1e30, so that the next loss is infinite or NaN."""
    return changed(
        tiny,
        optimizer={"name": "adamw", "schedule": "constant", "learning_rate": 1e30, "warmup_steps": 0},
        train={"checkpoint_every": 1, "keep_checkpoints": 5},
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(wild: Config, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2: not finite: loss .* parameters .*: model|step 2: .*: \w+/"):
        train(wild, tmp_path)
    assert Checkpoints(tmp_path).steps() == [1]


@pytest.mark.slow
def test_steps_that_are_not_finite_can_be_skipped_and_counted_and_change_nothing(wild: Config, tmp_path: Path) -> None:
    skipping = changed(wild, train={"non_finite": "skip", "max_skipped_steps": 2})
    with pytest.raises(NonFiniteError, match=r"step 4: .*; 2 steps in a row were skipped before it"):
        train(skipping, tmp_path)
    assert [record["skipped_steps"] for record in read_metrics(tmp_path, "train")] == [0, 1, 2]
    checkpoints, plan = Checkpoints(tmp_path), plan_state(wild, make_mesh(wild.mesh))
    assert checkpoints.steps() == [1, 2, 3]
    first, third = (named_leaves(checkpoints.restore_state(step, plan)) for step in (1, 3))
    assert (first.pop("step"), third.pop("step")) == (1, 3)
    for name, leaf in first.items():
        np.testing.assert_array_equal(third[name], leaf, err_msg=name)
    # The count continues, and `non_finite` may change.
    with pytest.raises(NonFiniteError, match=r"step 4: .*; 2 steps in a row"):
        train(skipping, tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 4: .*; checkpoints of earlier steps are intact"):
        train(wild, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "step"), [(3, 3), (0, 6)], ids=["on the way", "at the end"])
def test_sigterm_cuts_an_evaluation_short_which_is_done_when_the_run_is_resumed(
    tiny: Config, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, step: int
) -> None:
    class Terminated(Evaluator):
        def __call__(self, model: Model, check: Callable[[], None]) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                check()
                time.sleep(0.01)
            raise AssertionError("SIGTERM was not noticed")

    config = changed(tiny, evaluate={"every": every})
    with monkeypatch.context() as patch:
        patch.setattr(run, "Evaluator", Terminated)
        for _ in range(2):  # the second only starts the evaluation again
            assert train(config, tmp_path) == {"steps": step, "interrupted": True}
    assert Checkpoints(tmp_path).steps()[-1] == step
    assert read_metrics(tmp_path, "evaluate") == []
    assert train(config, tmp_path)["evaluation"]["neg_log_perplexity"] < 0
    expected = read_metrics(complete, "evaluate")
    assert read_metrics(tmp_path, "evaluate") == (expected if every else expected[1:])
    assert losses(tmp_path) == losses(complete)


def test_a_run_whose_records_are_lost_is_complete_all_the_same(tiny: Config, complete: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(complete, tmp_path / "copy")
    (workdir / "metrics.jsonl").unlink()
    summary = train(tiny, workdir)
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["loss"] is summary["tokens_per_second"] is None
    assert summary["evaluation"]["neg_log_perplexity"] < 0


def test_weights_are_taken_from_another_run(tiny: Config, complete: Path, tmp_path: Path) -> None:
    continued = changed(tiny, init_from={"workdir": str(complete)}, train={"steps": 1})
    train(continued, tmp_path)
    assert losses(tmp_path)[1] < losses(complete)[1]


def test_a_workdir_that_cannot_be_written_is_one_line(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        train(tiny, tmp_path / "file" / "workdir")


def start(config: Config, workdir: Path, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "config.json"
    path.write_text(config.to_json())
    command = [sys.executable, "-m", "tests.training.small_run", str(path), f"--workdir={workdir}"]
    # As in `conftest.py`: compiling takes longer than running.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with (folder / "stderr.log").open("wb") as log:
        return subprocess.Popen(command, stderr=log, env=environment)


def wait_for_step(process: subprocess.Popen[bytes], workdir: Path, step: int) -> None:
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.02)


@pytest.fixture(scope="module")
def long(tiny: Config) -> Config:
    TextData.prepare(tiny.data)  # the small corpora can be fetched in this process only
    return changed(
        tiny, train={"steps": 40, "checkpoint_every": 3}, evaluate={"every": 0}, mesh={"emulated_devices": 8}
    )


@pytest.fixture(scope="module")
def undisturbed(long: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(long, folder / "run", folder)
    assert process.wait() == 0, (folder / "stderr.log").read_text()
    return losses(folder / "run")


@pytest.mark.slow
def test_killed_at_any_moment_a_run_resumes_to_the_same_losses(
    long: Config, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    for step in (4, 17, 29):
        process = start(long, tmp_path / "run", tmp_path)
        wait_for_step(process, tmp_path / "run", step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = start(long, tmp_path / "run", tmp_path)
    assert process.wait() == 0, (tmp_path / "stderr.log").read_text()
    assert losses(tmp_path / "run") == undisturbed
    assert len(undisturbed) == 40


@pytest.mark.slow
def test_sigterm_saves_exits_cleanly_and_loses_nothing(
    long: Config, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    process = start(long, tmp_path / "run", tmp_path)
    wait_for_step(process, tmp_path / "run", 5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 0, (tmp_path / "stderr.log").read_text()
    reached = max(losses(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run").steps()[-1] == reached < 40
    assert start(long, tmp_path / "run", tmp_path).wait() == 0
    assert losses(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_a_full_disk_stops_the_run_in_one_line_and_it_resumes_when_there_is_space(
    long: Config, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    process = start(long, tmp_path / "run", tmp_path)
    wait_for_step(process, tmp_path / "run", 8)
    logs = [tmp_path / "run" / "metrics.jsonl", *(tmp_path / "run" / "tensorboard").iterdir()]
    size = max(log.stat().st_size for log in logs) + 2**14  # room for the logs of a few steps, not for a checkpoint
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    assert process.wait() == 2
    stderr = (tmp_path / "stderr.log").read_text()
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    # The save of step 6 may still have been in progress.
    assert re.fullmatch(
        r"error: cannot write a checkpoint to .*: File too large; the checkpoints \[3(, 6)?\] are intact", line
    )
    reached = max(losses(tmp_path / "run"))
    assert reached < 16
    assert start(long, tmp_path / "run", tmp_path).wait() == 0
    assert losses(tmp_path / "run") == undisturbed
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))
