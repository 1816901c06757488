"""Everything that this package uses of JAX's private modules; no other file imports `jax._src`.

JAX exports neither its coordination service, which orbax takes from the same place, nor the kinds of cluster that
`jax.distributed.initialize` looks for. `tests/parallel/test_private_jax.py` states what we assume about both.
"""

from jax._src.clusters import ClusterEnv, K8sCluster
from jax._src.distributed import global_state

coordination = global_state
"""`process_id`, `num_processes` and `client` of this process; a single process has no client (None).

Unlike `jax.process_index()` and `jax.process_count()`, reading them starts no device.
"""


def cluster_kinds() -> list[type[ClusterEnv]]:
    """The kinds of cluster that `jax.distributed.initialize` looks for by default, in its order."""
    return [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]


def is_kubernetes(kind: type[ClusterEnv]) -> bool:
    """True if a kind of cluster is Kubernetes, whose class in JAX has no name."""
    return kind is K8sCluster
