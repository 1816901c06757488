"""The study of faults: the moments and damages that it makes, and one fault for real."""

import json
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
from switchjax.studies.fault_study import FAULTS, Fault, FaultStudy, Try, study_faults
from tests.tiny import changed


def test_each_try_has_a_moment_with_checkpoints_before_and_after_it(tiny: Config, tmp_path: Path) -> None:
    study = FaultStudy([], changed(tiny, train={"steps": 60, "checkpoint_every": 4}), tmp_path, print)
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
        study_faults(["false"], changed(tiny, **change), tmp_path / "study", 20, print)
    assert not (tmp_path / "study").exists()


def checkpoint(workdir: Path, step: int) -> Path:
    folder = workdir / "checkpoints" / str(step)
    for name in ("state/arrays", "state/names", "config/metadata", "data/metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"train": {"seed": 0}, "rest": "x" * 1000}))
    return folder


def files(workdir: Path) -> dict[str, int]:
    return {str(path.relative_to(workdir)): path.stat().st_size for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [fault_study._truncate, fault_study._halve])
def test_only_the_newest_checkpoint_is_damaged(tmp_path: Path, damage: fault_study.Damage) -> None:
    for step in (8, 12):
        checkpoint(tmp_path, step)
    before = files(tmp_path)
    damage(tmp_path, 0, random.Random(0))
    after = files(tmp_path)
    changed_files = {name for name, size in before.items() if after.get(name) != size}
    assert changed_files
    assert all(name.startswith("checkpoints/12/") for name in changed_files)


def test_strangers_of_every_kind_come_after_the_newest_checkpoint(tmp_path: Path) -> None:
    newest = checkpoint(tmp_path, 12)
    before = files(newest)
    for attempt in range(4):
        fault_study._put_foreign(tmp_path, attempt, random.Random(attempt))
    others = [path for path in newest.parent.iterdir() if path != newest]
    assert len(others) == 4
    assert newest_checkpoint(tmp_path) in others
    assert files(newest) == before


def test_the_table_counts_tries(tmp_path: Path) -> None:
    tries = [Try(True, 1.5, False, True, 3), Try(False, 2.5, False, False, 0)]
    assert fault_study._row("a fault", tries) == "| a fault | 2 | 1 | 1 | 1.5 | 3 | 2.5 |"
    assert fault_study._is_one_line("error: cannot write\n", 2)
    assert not fault_study._is_one_line("Traceback (most recent call last):\nerror: cannot write\n", 2)
    assert not fault_study._is_one_line("done\n", 2)
    assert fault_study._is_one_line("done\n", 0)


def cut_arrays(workdir: Path, attempt: int, chance: random.Random) -> None:
    """Of the files that `_truncate` chooses from, one that is surely read."""
    os.truncate(newest_checkpoint(workdir) / "state" / "manifest.ocdbt", 20)


@pytest.mark.slow
def test_a_fault_is_tried_and_judged_by_the_process_after_it(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes longer than running what is compiled
    TextData.prepare(tiny.data)  # the small corpora can be fetched in this process only
    config = changed(
        tiny, train={"steps": 40, "checkpoint_every": 3}, evaluate={"every": 0}, mesh={"emulated_devices": 8}
    )
    (tmp_path / "config.json").write_text(config.to_json())
    training = [sys.executable, "-m", "tests.training.small_run", str(tmp_path / "config.json")]
    study = FaultStudy(training, config, tmp_path, print)
    fault = Fault("killed and damaged", 1, fault_study._at_step, fault_study._kill, -signal.SIGKILL, cut_arrays)
    (outcome,) = study.try_fault(fault)
    assert outcome.ended_well
    assert outcome.identical
    assert 0 < outcome.lost < 10
    run = tmp_path / "killed_and_damaged" / "run"
    assert last_step(run) == 40
    assert len(records(run)) == 41
    assert list((run / "damaged_checkpoints").iterdir())
    # What is done is not repeated, and what differs is seen.
    metrics = tmp_path / "undisturbed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 40', '"step": 41'))
    assert study.try_fault(fault) == [outcome]
    assert records(run) != study.undisturbed()
