"""Workdirs in every released format resume with the recorded losses, are evaluated and serve as `init_from`."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from switchjax.config import Config, UserError, load_workdir_config
from switchjax.config.formats import FORMAT, MIGRATIONS
from switchjax.parallel.mesh import make_mesh
from switchjax.training import checkpoint_names
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.evaluation import evaluate_workdir
from switchjax.training.run import train
from tests.tiny import changed, losses
from tests.training.make_fixture import FIXTURES, NAMES, config_of
from tests.training.test_recorded_losses import RECORDED, processor

pytestmark = pytest.mark.slow

STORED = {"encoder_decoder": "model/encoder/3/ff/experts/w_in", "peer": "model/decoder/1/ff/sub_keys"}


@pytest.fixture(params=[f"format_{number}/{name}" for number in range(FORMAT + 1) for name in NAMES])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a workdir with a checkpoint of step 4 of 6."""
    return shutil.copytree(FIXTURES / request.param, tmp_path / Path(request.param).name)


def test_every_format_has_a_way_to_the_next_and_a_fixture() -> None:
    assert list(MIGRATIONS) == list(checkpoint_names.MIGRATIONS) == list(range(FORMAT))
    assert {path.name for path in FIXTURES.glob("format_*")} == {f"format_{number}" for number in range(FORMAT + 1)}


def test_a_run_goes_on_as_if_it_had_never_stopped(written: Path, tiny: Config) -> None:
    expected = {
        int(step): float.fromhex(loss) for step, loss in json.loads((written / "losses.json").read_text()).items()
    }
    train(config_of(written.name, tiny), written)
    found = losses(written)
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    if json.loads(RECORDED.read_text())["processor"] == processor():
        assert found == expected
    else:
        # Other CPU instructions round differently.
        np.testing.assert_allclose([found[step] for step in (5, 6)], [expected[step] for step in (5, 6)], rtol=1e-3)
    assert json.loads((written / "config.json").read_text())["format"] == FORMAT
    assert STORED[written.name] in Checkpoints(written).shapes(6)


def test_a_model_is_evaluated_and_started_from_on_another_mesh(
    written: Path, tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = load_workdir_config(written)
    config = changed(saved, mesh={"data": 4, "expert": 2}, data={"directory": tiny.data.directory})
    step, metrics = evaluate_workdir(config, written, make_mesh(config.mesh))
    assert step == 4
    # Held-out text is about as hard as the batch of step 5, on which the same parameters are used.
    loss = float.fromhex(json.loads((written / "losses.json").read_text())["5"])
    assert -metrics["neg_log_perplexity"] == pytest.approx(loss, rel=0.05)
    deeper = changed(
        config,
        model={f"num_{stack}_layers": 6 for stack in config.model.stacks},
        init_from={"workdir": str(written)},
        train={"steps": 1},
    )
    with caplog.at_level(logging.INFO, "switchjax"):
        train(deeper, tmp_path / "deeper")
    assert "leaves 0 parameters of checkpoint 4" in caplog.text
    assert "parameters new: decoder/" in caplog.text or "parameters new: encoder/" in caplog.text


def test_a_newer_format_is_refused_in_one_line(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT + 1} | tiny.to_dict()))
    with pytest.raises(UserError, match=rf"format {FORMAT + 1} is not known here, only 0 to {FORMAT}"):
        load_workdir_config(tmp_path)
    written = shutil.copytree(FIXTURES / f"format_{FORMAT}" / "peer", tmp_path / "peer")
    path = written / "checkpoints" / "4" / "config" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    config = config_of("peer", tiny)
    with pytest.raises(UserError, match=rf"format {FORMAT + 1} is not known here"):
        evaluate_workdir(config, written, make_mesh(config.mesh))
