"""What scripts/train.py tells whoever waits for the run."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from switchjax.training import run
from tests.jobs.sandbox import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupted_run_is_not_taken_for_complete(
    script: ModuleType,
    interrupted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = {"steps": 3} | ({"interrupted": True} if interrupted else {"evaluation": {}})
    monkeypatch.setattr(run, "train", lambda *_: summary)
    arguments = [
        f"--config={ROOT}/configs/quickstart.py:runlocal",
        f"--workdir={tmp_path}",
        "--interrupted_exit_code=143",
    ]
    if interrupted:
        with pytest.raises(SystemExit, match="143"):
            script.main(arguments)
    else:
        script.main(arguments)
    assert ("the same command resumes" if interrupted else "done: 3 steps") in capsys.readouterr().out
