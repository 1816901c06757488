"""Joins the processes of a program, on one host or many."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from switchjax.config import UserError
from switchjax.config.checks import require
from switchjax.parallel.private_jax import ClusterEnv, cluster_kinds, is_kubernetes
from switchjax.parallel.processes import process_index
from switchjax.parallel.shutdown import closing_together

_log = logging.getLogger(__name__)


@contextmanager
def joined_processes(
    coordinator: str | None, count: int | None, index: int | None, heartbeat_timeout: int
) -> Iterator[None]:
    """Joins the processes for its block, in which JAX's devices are those of all; enter it before JAX is first used.

    JAX detects a TPU pod, SLURM, Open MPI and an indexed Kubernetes job; elsewhere, give all of `coordinator`, `count`
    and `index`. A single process starts no service. An error in the block ends this process without waiting for the
    others, which then end as well (`closing_together`).

    Args:
        coordinator: HOST:PORT of process 0.
        count: number of processes; 1 forces a single process even inside a cluster.
        index: number of this process, from 0.
        heartbeat_timeout: seconds without an answer after which a process counts as dead.

    Raises:
        UserError: if the arguments contradict each other, or the other processes cannot be joined.
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
        logging.getLogger("switchjax").setLevel(logging.WARNING)  # process 0 logs for all
    joined = ExitStack()
    joined.callback(jax.distributed.shutdown)
    with closing_together(joined):
        yield


def _checked(coordinator: str | None, count: int | None, index: int | None) -> dict[str, Any]:
    """Arguments for `jax.distributed.initialize`; empty if JAX must detect them."""
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
    """The number of processes of the cluster that JAX would detect; 1 without a cluster.

    Environment variables reveal all kinds of clusters but one. JAX asks the metadata server of a TPU VM only if it has
    found TPU chips, and not under `JAX_PLATFORMS=cpu`.
    """
    for cluster in filter(_may_be_here, cluster_kinds()):
        try:
            if cluster.is_env_present():
                return int(cluster.get_process_count())
        except OSError as error:  # no metadata server: the chips are outside Google's cloud
            _log.warning("no cluster of TPUs: %s", error)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot detect the cluster ({str(error).splitlines()[0]}): --process_count=1 forces a single process"
            ) from None
    return 1


def _may_be_here(cluster: type[ClusterEnv]) -> bool:
    """False for a kind of cluster for which JAX would search in vain, with warnings."""
    if is_kubernetes(cluster):  # to JAX, any pod looks like a cluster, but only an indexed job can be one
        return "JOB_COMPLETION_INDEX" in os.environ
    return "tpu" not in cluster.name or (jax.config.values["jax_platforms"] or "tpu").startswith("tpu")
