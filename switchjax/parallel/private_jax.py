"""All that this package takes from private modules of JAX: no other file imports `jax._src`.

JAX exports neither its coordination service, whose client orbax takes from here too, nor the kinds of cluster that
`jax.distributed.initialize` looks for. `tests/parallel/test_private_jax.py` states what is assumed of both.
"""

from jax._src.clusters import ClusterEnv, K8sCluster
from jax._src.distributed import global_state

coordination = global_state
"""This process among those of its program: `process_id`, `num_processes` and `client`, which is None in a single one.

Unlike `jax.process_index()` and `jax.process_count()`, reading it starts no device.
"""


def cluster_kinds() -> list[type[ClusterEnv]]:
    """The kinds of cluster that `jax.distributed.initialize` looks for without being asked to, in its order."""
    return [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]


def is_kubernetes(kind: type[ClusterEnv]) -> bool:
    """Whether a kind of cluster is Kubernetes, to which JAX gives no name."""
    return kind is K8sCluster
