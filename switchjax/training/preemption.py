"""What a run does on SIGTERM, which announces that its machine is taken away: it saves and stops."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class Preempted(Exception):
    """SIGTERM has arrived; raised where work can be dropped half-way."""


class Preemption:
    """Handles SIGTERM in a single process.

    While there is nothing to save, SIGTERM ends the process at once: the start can be repeated, and a compilation may
    take longer than the time that is left. Within `deferred` it only sets `requested`, and the loop saves and stops.

    Args:
        exit_code: of a process that is ended at once.
    """

    def __init__(self, exit_code: int = 0) -> None:
        self._exit_code = exit_code
        self.requested = False
        """Whether SIGTERM has arrived; the step under way is finished first."""
        self._deferred = False
        self._lock = threading.Lock()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it there is something to save, so SIGTERM does not end the process."""
        with self._lock:
            self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def reached(self, step: int) -> bool:
        """Whether to stop after `step` steps; the loop asks before each step."""
        del step
        return self.requested

    def check(self) -> None:
        """Raises `Preempted` if SIGTERM has arrived."""
        if self.requested:
            raise Preempted

    def receive(self) -> None:
        """Called when SIGTERM arrives: sets `requested`, or ends the process if nothing can be saved."""
        with self._lock:
            self.requested = True
            if not self._deferred:
                exit_at_once(self._exit_code)


class SharedPreemption(Preemption):
    """Handles SIGTERM in several processes: JAX's service picks one step after which all of them stop.

    JAX installs its own handler when the processes join. That handler never ends a process.
    """

    def reached(self, step: int) -> bool:
        from jax.experimental import multihost_utils  # not above: scripts say --help without JAX

        self.requested = multihost_utils.reached_preemption_sync_point(step)
        return self.requested


def exit_at_once(code: int) -> NoReturn:
    """Ends the process, which has nothing to save."""
    with suppress(OSError):  # of a full disk
        print("stopped: there was nothing to save; the same command resumes", flush=True)
    os._exit(code)


@contextmanager
def preemption(exit_code: int = 0) -> Iterator[Preemption]:
    """Handles SIGTERM; only in the main thread.

    Args:
        exit_code: as `Preemption` takes it.
    """
    from switchjax.parallel.processes import process_count  # as above

    if process_count() > 1:
        yield SharedPreemption()
        return
    state = Preemption(exit_code)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Python runs handlers between its own instructions, and so after a compilation; the byte is written at once.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    previous_file = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, state), name="sigterm", daemon=True)
    watcher.start()
    try:
        yield state
    finally:
        signal.set_wakeup_fd(previous_file)
        signal.signal(signal.SIGTERM, previous)
        writer.close()
        watcher.join()
        reader.close()


def _watch(reader: socket.socket, state: Preemption) -> None:
    while number := reader.recv(1):
        if number[0] == signal.SIGTERM:
            state.receive()
