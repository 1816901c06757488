"""Messages between the processes of one program, beside their arrays.

Each process runs the same program over its own devices, which JAX joins into one set (`joining.joined_processes`).
JAX's coordination service, which runs in process 0, carries the messages.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar

from switchjax.config import UserError
from switchjax.parallel.private_jax import coordination

_WITHOUT_LIMIT_MS = 2**31 - 1
"""No limit, because process 0 may prepare data for days; if it dies, `train.heartbeat_timeout` ends the wait."""

T = TypeVar("T")

_calls = itertools.count()


def process_index() -> int:
    """The number of this process, from 0. Unlike `jax.process_index`, starts no device."""
    return coordination.process_id


def process_count() -> int:
    """The number of processes. Unlike `jax.process_count`, starts no device."""
    return coordination.num_processes


def all_values(value: str) -> list[str]:
    """The `value` of every process, in their order, once all have called this.

    All processes must make their calls of this function in the same order.
    """
    client = coordination.client
    if client is None:
        return [value]
    key = f"switchjax/{next(_calls)}"
    client.key_value_set(f"{key}/{process_index()}", value)
    client.wait_at_barrier(key, _WITHOUT_LIMIT_MS)
    values = {int(name.rpartition("/")[2]): text for name, text in client.key_value_dir_get(f"{key}/")}
    return [values[index] for index in range(process_count())]


def first_then_others(function: Callable[[], T]) -> T:
    """`function()`, called in process 0 first and then in the others.

    So processes that share a disk create its files once, and a host with its own disk creates its own.

    Raises:
        UserError: in all processes, if `function` raises one in process 0.
    """
    if process_index() == 0:
        try:
            result = function()
        except UserError as error:
            all_values(f"error: {error}")
            raise
        all_values("")
        return result
    if problem := all_values("")[0]:
        raise UserError(problem.removeprefix("error: "))
    return function()
