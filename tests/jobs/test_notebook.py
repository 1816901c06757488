"""notebooks/quickstart.ipynb: as it is kept, and run in a short form where the extra `notebooks` is installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.sandbox import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SHORT = (
    "--config=configs/quickstart.py:runlocal --config.mesh.data=1 --config.mesh.expert=1 "
    "--config.mesh.emulated_devices=0 --config.model.num_encoder_layers=2 --config.evaluate.batches=1"
)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_it_is_kept_without_what_a_run_adds(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        assert not cell["metadata"]
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert cell["execution_count"] is None


def test_one_cell_installs_and_trains(cells: list[dict[str, Any]]) -> None:
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    installing = [i for i, source in enumerate(code) if '"pip", "install"' in source]
    training = [i for i, source in enumerate(code) if "scripts/train.py" in source]
    assert installing == training == [0]
    for source in code:
        compile(source, str(NOTEBOOK), "exec")


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the extra `notebooks` is not installed"
    nbformat = pytest.importorskip("nbformat", reason=why)
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("matplotlib", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    monkeypatch.setenv("NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("NOTEBOOK_FLAGS", SHORT)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own draws into it
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # as in the tests' own process
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(
        notebook, timeout=None, startup_timeout=600, kernel_name="python3", resources=place
    ).execute()
    shown = [
        "".join(output.get("text", "") + str(output.get("data", "")) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "done: 2 steps" in shown[0]
    assert "image/png" in shown[1]
    assert "checkpoint of step 2, test split" in shown[2]
    assert "In the [" in shown[3]
    assert (tmp_path / "run" / "summary.json").is_file()
