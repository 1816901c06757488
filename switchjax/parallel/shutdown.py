"""How a run ends, and one of several processes without leaving the others hanging.

Processes wait for each other in every step, so one that ends or stops moving must end them all. JAX's heartbeats see to
it when a process dies or is stopped (`train.heartbeat_timeout`); here is what they do not cover: errors in one process,
a process that lives but does not move, and a line that says what has happened.
"""

import contextlib
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol, TypeVar, runtime_checkable

import jax
from jax._src import distributed

from switchjax.config import UserError

_GRACE_SECONDS = 20
"""What a process that fails gives the others to fail as well, as they do when it is for the same reason."""

_SIGNS_OF_ABSENCE = ("Gloo", "NCCL", "onnection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")
"""In what JAX raises when another process has gone."""


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


Closable = TypeVar("Closable", bound=_Closable)


@contextmanager
def closing_together(resource: Closable) -> Iterator[Closable]:
    """Closes `resource` in the end, as `contextlib.closing` does, where closing waits for the other processes.

    Of several processes, one that fails says so and ends: at once where another has gone before, and otherwise after a
    little time in which closing may succeed, as it does where all fail alike.
    """
    try:
        yield resource
    except BaseException as error:
        if distributed.global_state.num_processes > 1:
            _end(error, resource)
        resource.close()
        raise
    resource.close()


def _end(error: BaseException, resource: _Closable) -> NoReturn:
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
    say_last(" ".join(message.split()))
    closing = threading.Thread(target=_close_quietly, args=(resource,), daemon=True)
    closing.start()
    closing.join(patience)
    os._exit(code)  # an orderly exit would wait for the others


def another_has_gone(error: BaseException) -> bool:
    """Whether JAX says so: it could not reach one of the other processes."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_ABSENCE)


def _close_quietly(resource: _Closable) -> None:
    with contextlib.suppress(Exception):
        resource.close()
        jax.distributed.shutdown()


_last_words: "LastWords | None" = None


class LastWords:
    """A line that is printed if this process ends without saying why: killed, or aborted by JAX for want of another.

    A process cannot print after SIGKILL, so `tail` does: it prints the last line that it was given once its input ends.
    An empty line before it ends that of a progress bar.
    """

    def __init__(self, index: int, count: int) -> None:
        global _last_words
        self._name = f"process {index} of {count}"
        # A session of its own, so that what is sent to all processes of a terminal does not reach it.
        self._tail = subprocess.Popen(["tail", "-n", "2"], stdin=subprocess.PIPE, stdout=2, start_new_session=True)
        self.update("starting")
        _last_words = self

    def update(self, doing: str) -> None:
        """Says what the process is about."""
        self._write(
            f"\nerror: {self._name} has been killed while {doing}, or ended by JAX because another process has ended "
            "or does not answer; checkpoints are intact"
        )

    def say(self, message: str) -> None:
        """Prints `message` instead, now."""
        print(f"\nerror: {self._name}: {message}", file=sys.stderr, flush=True)
        self.withdraw()  # not before: JAX may end the process at any moment

    def withdraw(self) -> None:
        """Nothing is printed any more."""
        self._tail.kill()
        self._tail.wait()

    def close(self) -> None:
        """Leaves the other processes, once they leave too."""
        jax.distributed.shutdown()
        self.withdraw()

    def _write(self, line: str) -> None:
        assert self._tail.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # withdrawn
            os.write(self._tail.stdin.fileno(), f"{line}\n".encode())


def say_last(message: str) -> None:
    """Prints one line on stderr, with the process' name where there are several, and no last words after it."""
    if _last_words:
        _last_words.say(message)
    else:
        print(f"error: {message}", file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process, and so all, when what it is about takes too long.

    A process that is stuck, say in reading data, lives on, and so do its heartbeats: the others would wait for ever.

    Args:
        timeout: seconds; 0: no limit. Those in which the process is stopped, as by ctrl-Z, do not count.
    """

    def __init__(self, timeout: int | float) -> None:
        self._timeout = timeout
        self._doing: str | None = None
        self._marks = 0
        self._closed = threading.Event()
        if timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, doing: str | None) -> None:
        """Says what is done from now on, and the time starts anew; None: something that may take any time."""
        self._doing = doing
        self._marks += 1
        if _last_words:
            _last_words.update(doing or "evaluating or saving")

    def close(self) -> None:
        """Watches no longer."""
        self._closed.set()

    def _watch(self) -> None:
        interval = min(self._timeout / 10, 10.0)
        seen, waited = -1, 0.0
        while not self._closed.wait(interval):
            waited = waited + interval if self._marks == seen else 0.0
            seen, doing = self._marks, self._doing
            if doing and waited >= self._timeout:
                say_last(
                    f"{doing} has taken longer than train.step_timeout={self._timeout:g} seconds; "
                    "checkpoints are intact"
                )
                os._exit(1)
