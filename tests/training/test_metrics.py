"""What is written can be read again, and a resumed run leaves no record twice."""

import json
from pathlib import Path

import numpy as np

from switchjax.training.metrics import MetricsWriter, read_metrics


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
