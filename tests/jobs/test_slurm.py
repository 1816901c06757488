"""scripts/slurm/train.sbatch: what it asks of SLURM, and what it makes of the ways in which a run ends."""

from pathlib import Path

import pytest

from tests.jobs.sandbox import ROOT, Sandbox

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"


def options() -> dict[str, str]:
    lines = [line.split() for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    pairs = [option.removeprefix("--").partition("=") for _, option in lines]
    return {name: value for name, _, value in pairs}


def test_one_process_a_gpu_that_sees_all_of_its_node() -> None:
    asked = options()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & asked.keys()


def test_the_run_has_time_to_save_and_its_job_to_come_back() -> None:
    asked = options()
    # Without B: to train.py, not to the shell around it.
    name, _, seconds = asked["signal"].partition("@")
    assert name == "TERM"
    assert int(seconds) >= 300
    assert asked.keys() >= {"requeue", "open-mode"}
    assert asked["open-mode"] == "append"


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    made.add("scontrol")
    (made.root / "scripts" / "environment.sh").write_text('echo "environment $1"')
    return made


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (143, True), (2, False), (137, False)])
def test_only_an_interrupted_run_comes_back(sandbox: Sandbox, ended: int, requeued: bool) -> None:
    sandbox.add("srun", f"exit {ended}")
    done = sandbox.run("bash scripts/slurm/train.sbatch --config=a '--workdir=b c'", SLURM_JOB_ID="7")
    assert done.stdout == "environment cuda\n"
    assert done.returncode == ended
    trained, *after = sandbox.calls()
    flags = ["--interrupted_exit_code=143", "--config=a", "--workdir=b c"]
    assert trained == ["srun", "python", "scripts/train.py", *flags]
    assert after == ([["scontrol", "requeue", "7"]] if requeued else [])


@pytest.mark.parametrize(
    "command", ["bash scripts/slurm/train.sbatch", "SLURM_JOB_ID= bash scripts/slurm/train.sbatch --config=a"]
)
def test_bad_use_is_one_line(sandbox: Sandbox, command: str) -> None:
    done = sandbox.run(command, SLURM_JOB_ID="7")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch scripts/slurm/train.sbatch ")
    assert len(done.stderr.splitlines()) == 1
    assert not sandbox.calls()
