"""The files of a run beside checkpoints and metrics are whole, and only one run uses a workdir at a time."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from switchjax.config import Config, OptimizerConfig, TrainConfig, UserError
from switchjax.training import workdir
from switchjax.training.workdir import exclusive_run, open_workdir, record_run, write_summary
from tests.training.full_disk import full_disk

HOLD = """
import sys, time
from pathlib import Path
from switchjax.training.workdir import exclusive_run
with exclusive_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_killed_or_not(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process trains in"), exclusive_run(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with exclusive_run(tmp_path):
        pass
    with exclusive_run(tmp_path):
        pass


def test_a_summary_that_a_full_disk_does_not_take_leaves_the_one_before(tmp_path: Path) -> None:
    write_summary(tmp_path, {"steps": 1})
    before = (tmp_path / "summary.json").read_bytes()
    with full_disk(4), pytest.raises(UserError, match=r"cannot write .*summary\.json: File too large"):
        write_summary(tmp_path, {"steps": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_bytes() == before


RECORD = '{"kind": "train", "step": 1}\n'

OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "a model of Hugging Face's": ({"config.json": '{"architectures": ["ViT"]}'}, "unknown config key 'architectures'"),
    "what is no JSON": ({"config.json": "{"}, "not valid JSON"),
    "a vocabulary": ({"vocabulary.model": "pieces"}, "No such file"),
    "metrics of another program": ({"metrics.jsonl": '{"loss": 1}\n'}, "No such file"),
    "another run": (
        {"config.json": Config(train=TrainConfig(seed=1)).to_json(), "metrics.jsonl": RECORD},
        r"train\.seed: 1 -> 0",
    ),
    "a complete run": ({"config.json": Config().to_json(), "summary.json": "{}"}, "without its checkpoints"),
    "a summary": ({"summary.json": "{}"}, "without its checkpoints"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_without_checkpoints_that_holds_anothers_files_is_refused(name: str, tmp_path: Path) -> None:
    files, message = OTHERS[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{message}.*; choose another --workdir"):
        open_workdir(tmp_path, Config())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    record_run(tmp_path, Config(), None)
    (tmp_path / "metrics.jsonl").write_text(RECORD)
    (tmp_path / "checkpoints").mkdir()
    open_workdir(tmp_path, Config(train=TrainConfig(steps=7)))


def test_a_run_that_has_recorded_nothing_may_be_tried_with_another_config(tmp_path: Path) -> None:
    record_run(tmp_path, Config(train=TrainConfig(seed=1)), None)
    (tmp_path / "metrics.jsonl").touch()
    assert open_workdir(tmp_path, Config()) == Config()


@pytest.mark.parametrize(("schedule", "warned"), [("cosine", True), ("linear", True), ("rsqrt", False)])
def test_another_number_of_steps_is_warned_of_where_learning_rates_depend_on_it(
    schedule: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(optimizer=OptimizerConfig(schedule=schedule), train=TrainConfig(steps=7))
    record_run(tmp_path, config, None)
    (tmp_path / "metrics.jsonl").write_text(RECORD)
    open_workdir(tmp_path, config)
    assert not caplog.messages
    open_workdir(tmp_path, Config(optimizer=config.optimizer, train=TrainConfig(steps=9)))
    message = f"optimizer.schedule={schedule} goes down to 0 at the last step: .* those of a run of 9 steps"
    assert any(re.fullmatch(message, line) for line in caplog.messages) is warned


def test_a_folder_that_the_first_of_several_processes_cannot_write_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(workdir, "process_count", lambda: 2)
    monkeypatch.setattr(workdir, "all_values", lambda value: [value, value])
    monkeypatch.setattr(Path, "touch", refuse)  # root may write everywhere
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: Permission denied"):
        open_workdir(tmp_path, Config())


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_an_url_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mount the bucket"):
        open_workdir(Path(url), Config())
    assert not list(tmp_path.iterdir())
