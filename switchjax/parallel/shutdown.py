"""Ends one of several processes without leaving the others waiting.

Processes wait for each other in every step, so one that ends or hangs must end them all. JAX's heartbeats do that for a
process that dies or is stopped (`train.heartbeat_timeout`): JAX aborts the others with its own message. This module
does it for an error in one process and for a process that runs but hangs.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol, TypeVar, runtime_checkable

import jax

from switchjax.config import UserError
from switchjax.parallel.processes import process_count, process_index

_GRACE_SECONDS = 20
"""Time in which the other processes may fail too, as they do if the cause is the same for all."""

_SIGNS_OF_ABSENCE = ("Gloo", "NCCL", "onnection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")
"""Parts of the messages that JAX raises when another process is gone."""


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


Closable = TypeVar("Closable", bound=_Closable)


@contextmanager
def closing_together(resource: Closable) -> Iterator[Closable]:
    """Closes a `resource` whose closing waits for the other processes; otherwise like `contextlib.closing`.

    If one of several processes fails, it prints the reason and ends itself: at once if another process is gone, and
    otherwise after a short time in which closing may succeed, as it does if all processes fail alike.
    """
    try:
        yield resource
    except BaseException as error:
        if process_count() > 1:
            _end(error, resource)
        resource.close()
        raise
    resource.close()


def _end(error: BaseException, resource: _Closable) -> NoReturn:
    """Prints `error`, tries to close `resource` and ends the process."""

    def close() -> None:
        with contextlib.suppress(Exception):
            resource.close()
            jax.distributed.shutdown()

    code, patience = 1, _GRACE_SECONDS
    if isinstance(error, UserError):
        code, message = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = 130, "interrupted"
    elif another_has_gone(error):
        patience, message = 0, f"another process has ended or does not answer ({str(error).splitlines()[0]})"
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    print_error(" ".join(message.split()))
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(patience)
    os._exit(code)  # a regular exit would wait for the other processes


def another_has_gone(error: BaseException) -> bool:
    """True if JAX raised `error` because it could not reach another process."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_ABSENCE)


def print_error(message: str) -> None:
    """Prints one line on stderr, with the number of the process if there are several."""
    # The line break ends the progress bar, perhaps of another process.
    name = f"\nerror: process {process_index()} of {process_count()}" if process_count() > 1 else "error"
    print(f"{name}: {message}", file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process, and with it all others, if its present activity takes longer than `timeout` seconds.

    A process that hangs, for example in reading data, still sends heartbeats, so the others would wait for ever. A
    timeout of 0 means no limit. Time in which the process is stopped, for example by ctrl-Z, does not count.
    """

    def __init__(self, timeout: int | float) -> None:
        self._timeout = timeout
        self._doing: str | None = None
        self._waits_for_others = False
        self._marks = 0
        self._closed = threading.Event()
        if timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, doing: str | None, waits_for_others: bool = False) -> None:
        """Restarts the time for the activity `doing`; None stands for one that may take any time."""
        self._doing = doing
        self._waits_for_others = waits_for_others
        self._marks += 1

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        interval = min(self._timeout / 10, 10.0)
        seen, waited = -1, 0.0
        while not self._closed.wait(interval):
            waited = waited + interval if self._marks == seen else 0.0
            seen, doing = self._marks, self._doing
            # A process that waits for another is given longer, so that the one that hangs says what in.
            if doing and waited >= self._timeout + 2 * interval * self._waits_for_others:
                limit = f"train.step_timeout={self._timeout:g} seconds"
                print_error(f"{doing} has taken longer than {limit}; checkpoints are intact")
                os._exit(1)
