"""Each damage of a workdir touches what its docstring says and nothing else."""

import json
import random
from pathlib import Path

import pytest

from switchjax.studies.disturbed_run import newest_checkpoint
from switchjax.studies.faults import Damage, halve, put_foreign, truncate


def checkpoint(workdir: Path, step: int) -> Path:
    folder = workdir / "checkpoints" / str(step)
    for name in ("state/arrays", "state/names", "config/metadata", "data/metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"train": {"seed": 0}, "rest": "x" * 1000}))
    return folder


def files(workdir: Path) -> dict[str, int]:
    return {str(path.relative_to(workdir)): path.stat().st_size for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [truncate, halve])
def test_only_the_newest_checkpoint_is_damaged(tmp_path: Path, damage: Damage) -> None:
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
        put_foreign(tmp_path, attempt, random.Random(attempt))
    others = [path for path in newest.parent.iterdir() if path != newest]
    assert len(others) == 4
    assert newest_checkpoint(tmp_path) in others
    assert files(newest) == before
