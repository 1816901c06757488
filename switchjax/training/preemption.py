"""Handles SIGTERM, which announces that the machine will be taken away: the run saves and stops."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class Preempted(Exception):
    """SIGTERM has arrived; raised in work that may stop half-way."""


class Preemption:
    """The response to SIGTERM.

    While there is nothing to save, SIGTERM ends a single process at once with `exit_code`: a start can be repeated, and
    a compilation may take longer than the remaining time. Within `deferred`, SIGTERM only sets `requested`; the loop
    then finishes its step, saves and stops.

    With `shared`, several processes must stop after the same step. JAX installs its own handler when they join, which
    never ends a process, and its service chooses the step.
    """

    def __init__(self, exit_code: int = 0, shared: bool = False) -> None:
        self._exit_code, self._shared = exit_code, shared
        self.requested = False
        self._deferred = False
        self._lock = threading.Lock()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Marks a block in which there is something to save, so that SIGTERM does not end the process."""
        with self._lock:
            self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def reached(self, step: int) -> bool:
        """True if the run must stop after `step` steps; the loop asks before each step."""
        if self._shared:
            from jax.experimental import multihost_utils  # not above, because --help runs without JAX

            self.requested = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def check(self) -> None:
        """Raises `Preempted` if SIGTERM has arrived."""
        if self.requested:
            raise Preempted

    def receive(self) -> None:
        """Sets `requested` when SIGTERM arrives, or ends the process if there is nothing to save."""
        with self._lock:
            self.requested = True
            if not self._deferred:
                exit_at_once(self._exit_code)


def exit_at_once(code: int) -> NoReturn:
    """Ends a process that has nothing to save."""
    with suppress(OSError):  # stdout may be on a full disk
        print("stopped: there was nothing to save; the same command resumes", flush=True)
    os._exit(code)


@contextmanager
def preemption(exit_code: int = 0) -> Iterator[Preemption]:
    """Installs the handler for SIGTERM, in the main thread; `exit_code` is that of `Preemption`."""
    from switchjax.parallel.processes import process_count  # not above, for the same reason

    if process_count() > 1:
        yield Preemption(shared=True)
        return
    state = Preemption(exit_code)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Python calls a handler only between its own instructions, so after a compilation. It writes a byte to the wakeup
    # file descriptor at once, and the thread below reads it.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    previous_file = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGTERM:
                state.receive()

    watcher = threading.Thread(target=watch, name="sigterm", daemon=True)
    watcher.start()
    try:
        yield state
    finally:
        signal.set_wakeup_fd(previous_file)
        signal.signal(signal.SIGTERM, previous)
        writer.close()
        watcher.join()
        reader.close()
