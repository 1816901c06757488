"""Every shell script: read by bash, and by shellcheck where it is installed."""

import shutil
import subprocess

import pytest

from tests.jobs.sandbox import ROOT

SCRIPTS = sorted(path for kind in ("*.sh", "*.job", "*.sbatch") for path in (ROOT / "scripts").rglob(kind))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: str) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_has_nothing_to_say() -> None:
    command = ["shellcheck", "--shell=bash", "--external-sources", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
