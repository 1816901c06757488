"""A process that fails or hangs prints the reason and ends; `tests/training/test_processes.py` runs several."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from switchjax.parallel.shutdown import closing_together


def run(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import os, time\nfrom switchjax.parallel.shutdown import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


FAILING = """
from switchjax.config import UserError
from switchjax.parallel.private_jax import coordination

coordination.process_id, coordination.num_processes = 1, 2
class Resource:
    def close(self): print("closed", flush=True)
with closing_together(Resource()):
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("UserError('no\\nroom')", 2, "no room"),
        ("KeyboardInterrupt", 130, "interrupted"),
        ("ValueError('odd')", 1, "ValueError: odd"),
    ],
)
def test_one_of_several_that_fails_says_why_closes_and_ends(error: str, code: int, line: str) -> None:
    done = run(FAILING.format(error=error))
    assert (done.returncode, done.stdout) == (code, "closed\n")
    assert done.stderr.endswith(f"\nerror: process 1 of 2: {line}\n")
    assert ("Traceback" in done.stderr) == (code == 1)


def test_what_takes_too_long_ends_the_process_and_what_may_take_any_time_does_not() -> None:
    done = run(
        "dog = Watchdog(0.2)\n"
        "for step in range(3): dog.mark(f'computing step {step}'); time.sleep(0.05)\n"
        "dog.mark(None); time.sleep(0.8); print('still here', flush=True)\n"
        "dog.mark('reading the batch of step 3'); time.sleep(100)"
    )
    assert done.returncode == 1
    assert done.stdout == "still here\n"
    assert done.stderr == (
        "error: reading the batch of step 3 has taken longer than train.step_timeout=0.2 seconds; "
        "checkpoints are intact\n"
    )


def test_a_watchdog_that_is_closed_or_without_limit_does_nothing() -> None:
    done = run("dog = Watchdog(0.1); dog.mark('a'); dog.close(); Watchdog(0).mark('b'); time.sleep(0.5); print('here')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


@dataclass
class Resource:
    closed: int = 0

    def close(self) -> None:
        self.closed += 1


def test_alone_an_error_passes_after_closing() -> None:
    resource = Resource()
    with closing_together(resource) as opened:
        assert opened is resource
    assert resource.closed == 1
    with pytest.raises(ZeroDivisionError), closing_together(resource):
        _ = 1 / 0
    assert resource.closed == 2
