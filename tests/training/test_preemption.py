"""SIGTERM ends a process at once while there is nothing to save, even during a compilation; later it sets a flag."""

import os
import signal
import subprocess
import sys
import time

import pytest

from switchjax.training.preemption import Preempted, preemption


def wait_until_requested(state: object) -> None:
    for _ in range(1000):
        if state.requested:
            return
        time.sleep(0.01)


def test_where_there_is_something_to_save_it_is_noted_and_the_handler_of_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as state, state.deferred():
        state.check()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until_requested(state)
        assert state.requested
        with pytest.raises(Preempted):
            state.check()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


COMPILATION = """
import ctypes
from switchjax.training.preemption import preemption
with preemption() as state:
    if {saved}:
        with state.deferred():
            pass
    print("started", flush=True)
    ctypes.CDLL(None).sleep(60)  # like a compilation, whose end Python's handlers await
"""


@pytest.mark.parametrize("saved", [False, True], ids=["before the first step", "after the last"])
def test_where_there_is_nothing_to_save_the_process_ends_at_once_with_exit_code_0(saved: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILATION.format(saved=saved)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    started = time.monotonic()
    process.terminate()
    assert process.wait(timeout=50) == 0
    assert time.monotonic() - started < 30
    assert process.stdout.read() == "stopped: there was nothing to save; the same command resumes\n"
    process.stdout.close()
