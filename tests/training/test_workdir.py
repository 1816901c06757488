"""What a run keeps beside its checkpoints and metrics."""

from pathlib import Path

import pytest

from switchjax.config import Config, UserError
from switchjax.training.workdir import open_workdir


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_an_url_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mount the bucket"):
        open_workdir(Path(url), Config())
    assert not list(tmp_path.iterdir())
