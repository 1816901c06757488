"""The study of faults: its moments and rows, and one real fault."""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from switchjax.config import Config, UserError
from switchjax.data.text import TextData
from switchjax.studies import fault_study
from switchjax.studies.disturbed_run import last_step, newest_checkpoint, records
from switchjax.studies.fault_study import FaultStudy, Try, is_one_line, make_row
from switchjax.studies.faults import FAULTS, Fault, at_step, kill
from tests.studies.written import check_written, measure
from tests.tiny import changed


def test_each_try_has_a_moment_with_checkpoints_before_and_after_it(tiny: Config, tmp_path: Path) -> None:
    study = FaultStudy([], changed(tiny, train={"steps": 60, "checkpoint_every": 4}), tmp_path)
    for fault in FAULTS:
        moments = study.moments(fault)
        assert moments == sorted(set(moments)) == study.moments(fault)
        assert len(moments) == fault.tries
        assert all(8 < moment < 56 and moment % fault.steps == 0 for moment in moments)
    assert sum(fault.tries for fault in FAULTS if fault.exit_code == -signal.SIGKILL) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"steps": 20, "checkpoint_every": 10}}, "12 x 'kill -9 at a random step' need as many steps"),
        ({"model": {"family": "decoder_only"}, "data": {"objective": "causal"}}, "faults need an encoder-decoder"),
    ],
)
def test_a_config_that_cannot_be_studied_is_refused_before_it_is_trained(
    tiny: Config, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        measure(fault_study, ["--config=tiny", f"--workdir={tmp_path / 'study'}"], {"tiny": changed(tiny, **change)})
    assert not (tmp_path / "study").exists()


def test_rows_count_tries_and_become_the_documents_table() -> None:
    row = make_row("a fault", [Try(True, 1.5, False, True, 3), Try(False, 2.5, False, False, 0)])
    assert check_written([row], "docs/faults.md") == [["| a fault | 2 | 1 | 1 | 1.5 | 3 | 2.5 |"]]


def test_an_error_is_one_line() -> None:
    assert is_one_line("error: cannot write\n", 2)
    assert not is_one_line("Traceback (most recent call last):\nerror: cannot write\n", 2)
    assert not is_one_line("done\n", 2)
    assert is_one_line("done\n", 0)


def cut_arrays(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Truncates a file that every restore reads."""
    os.truncate(newest_checkpoint(workdir) / "state" / "manifest.ocdbt", 20)


@pytest.mark.slow
def test_a_fault_is_tried_and_judged_by_the_process_after_it(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes longer than running
    TextData.prepare(tiny.data)  # only this process can fetch the small corpora
    config = changed(
        tiny, train={"steps": 40, "checkpoint_every": 3}, evaluate={"every": 0}, mesh={"emulated_devices": 8}
    )
    (tmp_path / "config.json").write_text(config.to_json())
    training = [sys.executable, "-m", "tests.training.small_run", str(tmp_path / "config.json")]
    study = FaultStudy(training, config, tmp_path)
    fault = Fault("killed and damaged", 1, at_step, kill, -signal.SIGKILL, cut_arrays)
    (outcome,) = study.try_fault(fault)
    assert outcome.ended_well
    assert outcome.identical
    assert 0 < outcome.lost < 10
    run = tmp_path / "killed_and_damaged" / "run"
    assert last_step(run) == 40
    assert len(records(run)) == 41
    assert list((run / "damaged_checkpoints").iterdir())
    # A second call repeats nothing, and a changed record is noticed.
    metrics = tmp_path / "undisturbed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 40', '"step": 41'))
    assert study.try_fault(fault) == [outcome]
    assert records(run) != study.undisturbed()
