"""A program in several processes, on one host or many: how they find each other and agree.

Each process runs the same program over its own devices. JAX makes one set of devices of them all; its coordination
service, which lives in process 0, carries what they say to each other beside that.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from jax._src import distributed  # where orbax, too, finds the service's client, which JAX does not export
from jax._src.clusters import ClusterEnv, K8sCluster

from switchjax.config import UserError
from switchjax.config.checks import require
from switchjax.parallel.shutdown import LastWords, closing_together

_log = logging.getLogger(__name__)

_WITHOUT_LIMIT_MS = 2**31 - 1
"""Process 0 may prepare data for days: what ends the wait is its silence (`train.heartbeat_timeout`)."""

T = TypeVar("T")

_calls = itertools.count()


@contextmanager
def joined_processes(
    coordinator: str | None, count: int | None, index: int | None, heartbeat_timeout: int
) -> Iterator[None]:
    """Within it, JAX's devices are those of all processes; to be entered before JAX is first used.

    A TPU pod, SLURM, Open MPI and an indexed job of Kubernetes are found by JAX; elsewhere all three of `coordinator`,
    `count` and `index` say who is there. Where there is nothing to join, nothing is started. An error within ends this
    process without waiting for the others, which then end as well (`closing_together`).

    Args:
        coordinator: HOST:PORT of process 0.
        count: number of processes; 1 alone asks for this process and no other, whatever cluster it is in.
        index: of this process, from 0.
        heartbeat_timeout: seconds after which a process that does not answer is taken for dead.

    Raises:
        UserError: if the three do not fit each other, or the others cannot be joined.
    """
    given = _checked(coordinator, count, index)
    if count == 1 or not (given or _cluster_size() > 1):
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=heartbeat_timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from None
    if process_index():
        logging.getLogger("switchjax").setLevel(logging.WARNING)  # process 0 speaks for all
    with closing_together(LastWords(process_index(), process_count())):
        yield


def _checked(coordinator: str | None, count: int | None, index: int | None) -> dict[str, Any]:
    """Arguments for `jax.distributed.initialize`; none where it is left to JAX to find them."""
    if coordinator is None and index is None and count in (None, 1):
        return {}
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --process_count and --process_index belong together")
    host, _, port = coordinator.rpartition(":")
    require(bool(host) and port.isdigit(), f"--coordinator must be HOST:PORT of process 0, got {coordinator}")
    require(count > 0, f"--process_count must be positive, got {count}")
    require(0 <= index < count, f"--process_index={index} is not one of the {count} processes 0 to {count - 1}")
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _cluster_size() -> int:
    """Processes of the cluster that JAX would find; 1 without one.

    All but one kind are found by variables of the environment. The metadata server of a TPU VM is asked only where JAX
    has found TPU chips, and not under `JAX_PLATFORMS=cpu`.
    """
    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not _may_be(cluster):
            continue
        try:
            if cluster.is_env_present():
                return int(cluster.get_process_count())
        except OSError as error:  # no metadata server: chips outside of Google's cloud
            _log.warning("no cluster of TPUs: %s", error)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot find out what cluster this is ({str(error).splitlines()[0]}): --process_count=1 asks for none"
            ) from None
    return 1


def _may_be(cluster: type[ClusterEnv]) -> bool:
    """False for what JAX would look for in vain, and loudly."""
    if cluster is K8sCluster:  # any pod looks like a cluster to JAX, but only an indexed job can be one
        return "JOB_COMPLETION_INDEX" in os.environ
    return "tpu" not in cluster.name or (jax.config.values["jax_platforms"] or "tpu").startswith("tpu")


def process_index() -> int:
    """Of this process; 0 where there is one only. Unlike `jax.process_index`, starts no device."""
    return distributed.global_state.process_id


def process_count() -> int:
    """Number of processes. Unlike `jax.process_count`, starts no device."""
    return distributed.global_state.num_processes


def exchange(value: str) -> list[str]:
    """The `value` of every process in their order, once all have called this. All must, and in the same order."""
    client = distributed.global_state.client
    if client is None:
        return [value]
    key = f"switchjax/{next(_calls)}"
    client.key_value_set(f"{key}/{process_index()}", value)
    client.wait_at_barrier(key, _WITHOUT_LIMIT_MS)
    values = {int(name.rpartition("/")[2]): text for name, text in client.key_value_dir_get(f"{key}/")}
    return [values[index] for index in range(process_count())]


def first_then_others(function: Callable[[], T]) -> T:
    """`function()` in process 0 and, once it has returned there, in the others.

    So what it makes on a shared disk is made once, and each host with a disk of its own makes its own.

    Raises:
        UserError: in all processes, if `function` raises one in process 0.
    """
    if process_index() == 0:
        try:
            result = function()
        except UserError as error:
            exchange(f"error: {error}")
            raise
        exchange("")
        return result
    if problem := exchange("")[0]:
        raise UserError(problem.removeprefix("error: "))
    return function()
