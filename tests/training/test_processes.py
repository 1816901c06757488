"""A run continues in 1, 2 and 4 processes in turn, and after every way of losing a process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from switchjax.config import Config, MeshConfig
from switchjax.data.text import TextData
from switchjax.parallel.mesh import make_mesh
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.evaluation import evaluate_workdir
from switchjax.training.metrics import read_metrics
from switchjax.training.run import train
from tests.tiny import changed, losses

pytestmark = pytest.mark.slow

CLOSE = 1e-5
"""Relative tolerance: float32 sums over devices have another order, and six updates carry the difference along."""

BOUND = 600
"""Seconds for a wait that takes about 20 on a quiet machine; if a test fails, the processes would wait for ever."""

Start = Callable[..., list[subprocess.Popen[bytes]]]


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    TextData.prepare(tiny.data)  # the small corpora can be fetched in this process only
    return changed(  # as little to compile as there is
        tiny,
        model={"dtype": "float32", "family": "decoder_only", "pattern": ("moe",), "num_decoder_layers": 1},
        data={"objective": "causal"},
        mesh={"data": 1, "expert": 4, "emulated_devices": 4},
        train={"keep_checkpoints": 3},
    )


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the same run in this process, on 8 devices."""
    workdir = tmp_path_factory.mktemp("whole")
    train(changed(config, mesh={"data": 2, "expert": 4, "emulated_devices": 8}), workdir)
    return workdir


@pytest.fixture(scope="module")
def start(pytestconfig: pytest.Config) -> Start:
    """Starts a run in several processes, the last one with `options`; their stderr goes to `folder`.

    With `own_disks`, each has only its own corpora and must still make vocabulary and tokens.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(
        config: Config,
        workdir: Path,
        folder: Path,
        count: int,
        *options: str,
        slurm: bool = False,
        own_disks: bool = False,
    ) -> list[subprocess.Popen[bytes]]:
        folder.mkdir(exist_ok=True)
        port = free_port()
        processes = []
        for index in range(count):
            path, own = folder / f"config.{index}.json", folder / f"disk.{index}"
            path.write_text((changed(config, data={"directory": str(own)}) if own_disks else config).to_json())
            if own_disks:
                shutil.copytree(Path(config.data.directory, "datasets"), own / "datasets")
            command = [sys.executable, "-m", "tests.training.small_run", str(path), f"--workdir={workdir}"]
            command += [f"--rows={folder / f'rows.{index}'}", *(options if index == count - 1 else ())]
            variables = environment
            if slurm:
                variables = environment | slurm_variables(port, count, index)
            else:
                command += [
                    f"--coordinator=localhost:{port}",
                    f"--process_count={count}",
                    f"--process_index={index}",
                ]
            with (folder / f"stderr.{index}").open("wb") as log:
                processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=log))
        return processes

    return start


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def slurm_variables(port: int, count: int, index: int) -> dict[str, str]:
    """The variables that `srun` sets for its tasks."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),  # otherwise JAX derives one from the job's number
    }


def ended(processes: list[subprocess.Popen[bytes]], folder: Path) -> list[tuple[int, str]]:
    """The exit code and stderr of each process; all must end within `BOUND`."""
    deadline = time.monotonic() + BOUND
    try:
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, (folder / f"stderr.{index}").read_text()) for index, code in enumerate(codes)]


def assert_same_losses(workdir: Path, whole: Path) -> None:
    expected = losses(whole)
    assert [record["step"] for record in read_metrics(workdir, "train")] == list(expected)  # each step, once
    assert losses(workdir) == pytest.approx(expected, rel=CLOSE)
    found, wanted = read_metrics(workdir, "evaluate"), read_metrics(whole, "evaluate")
    assert [record.pop("kind") for record in found + wanted] == ["evaluate"] * 4
    assert found == [pytest.approx(record, rel=CLOSE) for record in wanted]


def rows_read(folder: Path, count: int, batches: int) -> list[set[int]]:
    """The positions, in the first batches, of the rows that each process has read; it may have read more."""
    read = [[int(line) for line in (folder / f"rows.{index}").read_text().split()] for index in range(count)]
    for rows in read:
        assert rows == sorted(set(rows)), "in order, and none twice"
        assert rows[-1] >= 24 * (batches - 1)
    return [{row % 24 for row in rows} for rows in read]


@pytest.fixture(scope="module")
def two(config: Config, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run by 2 processes with 2 devices and a disk each, started as SLURM starts them."""
    folder = tmp_path_factory.mktemp("two")
    for code, stderr in ended(start(config, folder / "run", folder, 2, slurm=True, own_disks=True), folder):
        assert code == 0, stderr
    return folder


def test_losses_and_rows_are_the_same_in_two_processes(two: Path, whole: Path) -> None:
    run = two / "run"
    assert_same_losses(run, whole)
    assert (two / "disk.1" / "tokens").is_dir()
    assert rows_read(two, 2, 6) == [set(range(12)), set(range(12, 24))]
    assert Checkpoints(run).steps() == [2, 4, 6]
    assert (run / "summary.json").is_file()


def test_a_run_goes_on_in_one_process_with_more_devices_and_another_mesh(
    config: Config, whole: Path, two: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(two / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    train(changed(config, mesh={"expert": 4, "model": 2, "emulated_devices": 8}), run)
    assert_same_losses(run, whole)
    step, results = evaluate_workdir(config, run, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert step == 6
    expected = read_metrics(whole, "evaluate")[-1]
    assert results == pytest.approx({name: expected[name] for name in results}, rel=CLOSE)


def test_two_processes_go_on_from_one_and_pass_over_what_one_of_them_cannot_read(
    config: Config, whole: Path, two: Path, start: Start, tmp_path: Path
) -> None:
    """Step 4 is damaged in the part of process 1, so both use step 2, which one process with 8 devices has saved."""
    run = shutil.copytree(whole, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.copytree(two / "run" / "checkpoints" / "4", run / "checkpoints" / "4")
    parts = [path for path in (run / "checkpoints" / "4" / "state" / "ocdbt.process_1").rglob("*") if path.is_file()]
    assert parts
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for code, stderr in ended(start(config, run, tmp_path, 2), tmp_path):
        assert code == 0, stderr
        assert "checkpoint 4 cannot be read" in stderr
    assert_same_losses(run, whole)
    assert list((run / "damaged_checkpoints").glob("4-*"))


def test_sigterm_to_one_of_four_stops_all_at_the_same_step(
    config: Config, whole: Path, start: Start, tmp_path: Path
) -> None:
    """Over `model`, pairs of processes have the same rows and half of every matrix each."""
    run, halves = tmp_path / "run", {"data": 2, "expert": 1, "model": 2}
    processes = start(changed(config, mesh=halves, train={"steps": 400}), run, tmp_path, 4)
    wait_for_step(processes, run, 4)
    processes[3].terminate()
    for code, stderr in ended(processes, tmp_path):
        assert code == 0, stderr
    found, expected = losses(run), losses(whole)
    reached = max(found)
    assert 4 <= reached < 400
    assert Checkpoints(run).steps()[-1] == reached
    common = [step for step in expected if step in found]
    assert [found[step] for step in common] == pytest.approx([expected[step] for step in common], rel=CLOSE)
    assert rows_read(tmp_path, 4, reached) == [set(range(12))] * 2 + [set(range(12, 24))] * 2


def wait_for_step(processes: list[subprocess.Popen[bytes]], workdir: Path, step: int) -> None:
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + BOUND
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert all(process.poll() is None for process in processes), "a process has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def long(config: Config) -> Config:
    return changed(config, train={"steps": 400, "heartbeat_timeout": 30}, evaluate={"every": 0})


@pytest.mark.parametrize(("lost", "signal_number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_is_killed_or_stopped_ends_the_other_with_a_line(
    long: Config, start: Start, tmp_path: Path, lost: int, signal_number: int
) -> None:
    processes = start(long, tmp_path / "run", tmp_path, 2)
    wait_for_step(processes, tmp_path / "run", 4)
    processes[lost].send_signal(signal_number)
    survivor = 1 - lost
    try:
        assert processes[survivor].wait(BOUND) not in (0, None)
    finally:
        for process in processes:
            process.kill()
    assert_says_that_another_is_gone(tmp_path, survivor)
    assert Checkpoints(tmp_path / "run").steps()[-1] >= 2
    processes[lost].wait()


def assert_says_that_another_is_gone(folder: Path, index: int) -> None:
    """Checks for a line of ours, or of JAX if JAX noticed first and aborted the process."""
    stderr = (folder / f"stderr.{index}").read_text()
    by_jax = "Terminating process because the JAX distributed service detected fatal errors" in stderr
    lines = said(folder, index)
    assert lines or by_jax, stderr
    assert all("another process has ended or does not answer" in line for line in lines)


def said(folder: Path, index: int) -> list[str]:
    """The lines in which one of two processes says why it ended."""
    lines = (folder / f"stderr.{index}").read_text().splitlines()
    return [line for line in lines if line.startswith(f"error: process {index} of 2")]


def test_a_process_that_is_stuck_in_reading_data_ends_all_and_says_so(
    long: Config, start: Start, tmp_path: Path
) -> None:
    shorter = changed(long, train={"step_timeout": 20})
    processes = start(shorter, tmp_path / "run", tmp_path, 2, f"--stuck_at={24 * 5}")
    codes = [code for code, _ in ended(processes, tmp_path)]
    assert 0 not in codes
    (line,) = said(tmp_path, 1)
    assert "reading the batch of step 6 has taken longer than train.step_timeout=20 seconds" in line
    # The other notices that this one is gone, or that its own step, which waits for this one, takes too long.
    if not any("computing step 6 has taken longer than" in line for line in said(tmp_path, 0)):
        assert_says_that_another_is_gone(tmp_path, 0)


def test_a_workdir_that_is_not_shared_is_refused_by_all(long: Config, start: Start, tmp_path: Path) -> None:
    processes = start(long, tmp_path / "run", tmp_path, 2, "--own_workdir")
    assert [code for code, _ in ended(processes, tmp_path)] == [2, 2]
    for index in range(2):
        (line,) = said(tmp_path, index)
        assert "must lie on a disk that all processes share: process 1 does not see what process 0 writes there" in line
