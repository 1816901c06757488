"""Written metrics can be read again, and a resumed run writes no record twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from switchjax.config import UserError
from switchjax.training.metrics import MetricsWriter, _Events, read_metrics
from tests.training.full_disk import full_disk


def test_records_come_back_as_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write("train", 1, {"loss": np.float32(2.5), "expert_load": np.array([[0.25, 0.75]])})
    writer.write("evaluate", 1, {"neg_log_perplexity": -3.0})
    writer.close()
    assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1, "loss": 2.5, "expert_load": [[0.25, 0.75]]}]
    assert read_metrics(tmp_path, "evaluate")[0]["neg_log_perplexity"] == -3.0
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_resuming_drops_later_records_and_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": step}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "tr')
    MetricsWriter(tmp_path, resume_step=3).close()
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2, 3]


def test_what_a_power_cut_has_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n' + b"\0\xff\n")
    MetricsWriter(tmp_path, resume_step=3).close()
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1]


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1, 2]", "7", '{"step": "last"}'])
def test_anothers_records_are_one_line_and_stay(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl holds a line that is not a record of a run: "):
        MetricsWriter(tmp_path, resume_step=0)
    assert path.read_text() == f"{line}\n"


def test_a_full_disk_is_one_line_and_what_was_written_can_be_read(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write("train", 1, {"loss": 2.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with full_disk(size + 10), pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):
        writer.write("train", 2, {"loss": 2.25})
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    writer.write("train", 2, {"loss": 2.25})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2]


def test_events_that_a_full_disk_does_not_take_are_an_error_and_leave_those_before_whole(tmp_path: Path) -> None:
    events = _Events(tmp_path / "tensorboard", 0)
    events.write(1, {"train/loss": 0.5})
    scalars = {f"train/a_metric_of_a_long_name_{i}": 0.5 for i in range(500)}
    with full_disk(10_000), pytest.raises(UserError, match=r"cannot write .*tensorboard: File too large"):
        events.write(2, scalars)
    events.close()
    read = read_events(tmp_path / "tensorboard")
    assert read[0].file_version == "brain.Event:2"
    assert [(event.step, event.summary.value[0].tag) for event in read if event.summary.value] == [(1, "train/loss")]


def read_events(folder: Path) -> list[Event]:
    """The events that TensorBoard reads; checks that they are whole to the end of the file."""
    (path,) = folder.iterdir()
    rest, events = path.read_bytes(), []
    while rest:
        size = int.from_bytes(rest[:8], "little")
        head, data, tail, rest = rest[8:12], rest[12 : 12 + size], rest[12 + size : 16 + size], rest[16 + size :]
        assert int.from_bytes(head, "little") == masked_crc32c(size.to_bytes(8, "little"))
        assert int.from_bytes(tail, "little") == masked_crc32c(data)
        events.append(Event.FromString(data))
    return events


def test_a_run_that_was_killed_can_be_read_while_its_last_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1}]
