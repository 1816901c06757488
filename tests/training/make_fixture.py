"""Writes the fixtures of the current format: `python -m pytest tests/training/make_fixture.py`.

Each is the workdir of a tiny model after 4 of 6 steps, with the losses of all 6 as hexadecimal numbers in losses.json.
pytest runs this, so that writing and reading tests use the same settings.
"""

import json
import shutil
from pathlib import Path

import pytest

from switchjax.config import Config
from switchjax.config.formats import FORMAT
from switchjax.training.run import train
from tests.tiny import changed, losses

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("encoder_decoder", "peer")


def config_of(name: str, tiny: Config) -> Config:
    """The config of a fixture, with the corpora of `tiny`."""
    kept = changed(tiny, train={"checkpoint_every": 4}, evaluate={"every": 0})
    if name == "encoder_decoder":
        moe = {
            "router": "sigmoid",
            "options": {"bias_update_rate": 0.01},
            "loss_weights": {"router_z_loss": 0.001},
        }
        return changed(kept, model={"num_encoder_layers": 4}, moe=moe)
    return changed(
        kept,
        data={"objective": "causal"},
        model={"family": "decoder_only", "pattern": ("dense", "peer"), "positions": "rotary", "scale_scores": True},
        moe={"num_experts": 64, "num_selected_experts": 2, "options": {"peer_heads": 2, "peer_query": 8}},
        optimizer={"name": "adamw", "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 1},
    )


@pytest.mark.parametrize("name", NAMES)
def test_write(name: str, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workdir = Path(name)
    train(config_of(name, changed(tiny, data={"directory": "data"})), workdir)
    (workdir / "losses.json").write_text(
        json.dumps({step: loss.hex() for step, loss in losses(workdir).items()}) + "\n"
    )
    metrics = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in metrics if json.loads(line)["step"] <= 4))
    written = ("config.json", "vocabulary.model", "metrics.jsonl", "losses.json", "checkpoints/4")
    target = FIXTURES / f"format_{FORMAT}" / name
    shutil.rmtree(target, ignore_errors=True)
    for path in written:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (workdir / path).is_dir() else shutil.copy)(workdir / path, target / path)
