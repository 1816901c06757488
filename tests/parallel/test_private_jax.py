"""The package's assumptions about JAX's private modules, for every supported version."""

import socket
import subprocess
import sys

from switchjax.parallel.private_jax import cluster_kinds, coordination, is_kubernetes


def test_a_single_process_has_no_service() -> None:
    assert (coordination.process_id, coordination.num_processes, coordination.client) == (0, 1, None)


SERVICE = """
import sys
import jax
from switchjax.parallel.private_jax import coordination

jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0, cluster_detection_method="deactivate")
client = coordination.client
client.key_value_set("folder/0", "value")
client.wait_at_barrier("barrier", 1000)
print(client.key_value_dir_get("folder/"))
jax.distributed.shutdown()
print(coordination.client)
"""


def test_the_services_client_keeps_values_and_has_barriers() -> None:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        address = f"localhost:{opened.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, address], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "[('folder/0', 'value')]\nNone\n", done.stderr


def test_clusters_are_named_and_say_whether_they_are_there_and_how_large() -> None:
    kinds = {kind.name: kind for kind in cluster_kinds()}
    assert {"slurm", "ompi", "gketpu", "gcetpu"} <= set(kinds)
    assert [is_kubernetes(kind) for kind in kinds.values()].count(True) == 1
    assert "mpi4py" not in kinds, "JAX looks for it only when asked to"
    assert not kinds["slurm"].is_env_present()
    assert all(callable(kind.get_process_count) for kind in kinds.values())
