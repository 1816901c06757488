import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from switchjax.config import DataConfig
from switchjax.data.text import TextData

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prints_the_table_and_an_example(
    script: ModuleType, data: TextData, config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--corpora=tales,yarns", f"--directory={config.directory}", "--vocabulary_size=330"])
    output = capsys.readouterr().out
    assert "tales   validation" in output
    assert "<extra_id_0>" in output


def test_prints_what_a_decoder_predicts(
    script: ModuleType, data: TextData, config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--directory={config.directory}", "--vocabulary_size=330", "--objective=causal"]
    script.main(["--corpora=tales,yarns", *flags])
    output = capsys.readouterr().out
    assert "targets:" in output
    assert "inputs:" not in output


def test_prints_counts_of_classes_and_a_picture(
    script: ModuleType, image_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--objective=classification", "--corpora=doodles", f"--directory={image_config.directory}"])
    table, _, example = capsys.readouterr().out.partition("\n\n")
    assert table.splitlines()[-1].split() == ["doodles", "test", "12", "4", "4", "4"]
    title, *picture = example.rstrip("\n").splitlines()
    assert title.startswith("doodles, ")
    assert len(picture) == 6
    assert all(len(line) <= 10 for line in picture)


def test_lists_the_corpora(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--list"])
    assert "moby_dick" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpora=nope"], "error: no corpus is available here: nope"),
        (["--corpora=kjv,kjv"], "error: data.corpora names a corpus twice"),
        (["--directory=/dev/null/x"], "error: cannot prepare data in /dev/null/x"),
        (["--objective=bogus"], "error: data.objective: unknown value 'bogus'"),
        (["--bogus"], "error: unrecognized arguments: --bogus"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    command = [sys.executable, str(SCRIPT), f"--directory={tmp_path}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr


def test_says_why_a_corpus_is_passed_over(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), f"--directory={tmp_path}", "--corpora=moby_dik"]
    warning, _ = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    assert warning.startswith("Skipping corpus moby_dik: ")
    assert "did you mean 'moby_dick'" in warning
