"""Detection and joining of clusters, and the refusals; `tests/training/test_processes.py` runs real processes."""

import warnings
from typing import Any

import jax
import pytest
import requests

from switchjax.config import UserError
from switchjax.parallel.joining import joined_processes

SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which JAX was asked to join processes; replaces the join and the metadata server."""
    calls: list[dict[str, Any]] = []

    def initialize(**arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("nobody there\nat all")

    def get(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the metadata server is asked")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    return calls


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod, a notebook's too
        {"TPU_WORKER_HOSTNAMES": "localhost"},  # as `stand_in_for_tpu_metadata` has it
    ],
)
def test_alone_nothing_is_started_or_asked(
    environment: dict[str, str], started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(), joined_processes(None, None, None, 100):
        warnings.simplefilter("error")
    assert not started


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI])
def test_a_cluster_is_joined_unless_one_process_is_asked_for(
    environment: dict[str, str], started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with joined_processes(None, 1, None, 100):
        assert not started
    with (
        pytest.raises(UserError, match=r"cannot join the other processes: nobody there$"),
        joined_processes(None, None, None, 30),
    ):
        pass
    assert started == [{"heartbeat_timeout_seconds": 30}]


def test_the_flags_are_what_jax_is_told_in_any_cluster(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match="cannot join"), joined_processes("host:80", 3, 2, 100):
        pass
    (call,) = started
    assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == ("host:80", 3, 2)
    assert call["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "message"),
    [
        ("localhost:80", None, None, "belong together"),
        (None, 2, 1, "belong together"),
        (None, 2, None, "belong together"),
        (None, 1, 0, "belong together"),
        ("localhost", 2, 0, "must be HOST:PORT of process 0, got localhost"),
        ("localhost:http", 2, 0, "must be HOST:PORT"),
        (":80", 2, 0, "must be HOST:PORT"),
        ("localhost:80", 0, 0, "--process_count must be positive, got 0"),
        ("localhost:80", 2, 2, "--process_index=2 is not one of the 2 processes 0 to 1"),
        ("localhost:80", 2, -1, "--process_index=-1 is not one"),
    ],
)
def test_flags_that_do_not_fit_each_other_are_refused(
    coordinator: str | None, count: int | None, index: int | None, message: str, started: list[dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=message), joined_processes(coordinator, count, index, 100):
        pass
    assert not started
