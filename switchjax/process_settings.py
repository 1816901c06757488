"""What the scripts set for their own process. Each function changes one thing that a library does and says why.

| function | called by | switched off by |
|---|---|---|
| `log_to_stderr` | every script | |
| `hide_repeated_checkpoint_errors` | every script | `SWITCHJAX_SHOW_ALL_ERRORS=1` |
| `stand_in_for_tpu_metadata` | every script | setting the two variables of libtpu yourself |
| `keep_compiled_programs` | every script | JAX's own variables |
| `keep_freed_memory` | scripts that run models | `SWITCHJAX_MALLOPT=0` |
"""

import ctypes
import glob
import logging
import os
import re
import sys
from typing import Any

from switchjax.config import user_cache

_TPUS, _GPUS = ("accel[0-9]*", "vfio/[0-9]*"), ("nvidia[0-9]*", "kfd")  # under /dev
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h

_LEFT_OUT = {
    # orbax logs an error that its background threads hand on, and hands it on.
    "absl": r"\[process=\w+\].*(_SignalingThread\.run\(\) raised an exception"
    r"|Failed to run \d+ Handler Commit operations"
    r"|Save Finalize thread \(\w+\) failed)"
    # A checkpoint that is only read is opened so, which needs no warning.
    r"|Given directory is read only=",
    # asyncio logs what becomes of orbax's other reads or writes when one of them has failed.
    "asyncio": r"(Task|Future|_GatheringFuture) exception was never retrieved.*(orbax|tensorstore)",
}
"""Logger -> the messages of orbax that are left out."""


def log_to_stderr() -> None:
    """Prints the log lines of this package, and the warnings and errors of all others, as they are."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("switchjax").setLevel(logging.INFO)


def hide_repeated_checkpoint_errors() -> None:
    """Leaves out what orbax prints about a failed read or write besides the error that it raises.

    A damaged checkpoint or a full disk is one line of ours. orbax adds up to hundreds of tracebacks of the same error:
    it logs what it raises, and ends its event loop while other reads and writes go on, which then fail in turn. Those
    in tensorstore's threads can reach Python only through `sys.unraisablehook`, so that is where they are left out. All
    other messages of orbax, absl and asyncio appear.

    `SWITCHJAX_SHOW_ALL_ERRORS=1` leaves everything as it is.
    """
    if os.environ.get("SWITCHJAX_SHOW_ALL_ERRORS") == "1":
        return
    for name, pattern in _LEFT_OUT.items():
        logging.getLogger(name).addFilter(_AllBut(pattern))
    report = sys.unraisablehook

    def report_others(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            report(found)

    sys.unraisablehook = report_others


class _AllBut(logging.Filter):
    """Passes every message but those that match a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None


def stand_in_for_tpu_metadata() -> None:
    """Tells libtpu, where it is installed for planning and no TPU is here, what it would ask a TPU's host for.

    It would wait for Google's metadata server and complain that there is none. Variables that are set stay.
    """
    if not _devices(*_TPUS):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, for the next process that asks for the same.

    JAX's own variables say otherwise: JAX_COMPILATION_CACHE_DIR where, JAX_ENABLE_COMPILATION_CACHE=false not at all.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = user_cache() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run
    except OSError:
        return
    if os.access(folder, os.W_OK):  # JAX would warn of every program that it cannot write
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # A start compiles a hundred small programs, most of them in less than JAX's limit of a second.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def keep_freed_memory() -> None:
    """Has glibc's malloc keep the memory that is freed, instead of handing it back to the kernel; CPUs only.

    On the CPU, XLA allocates a program's temporaries as one piece at each call. If that goes back each time, the kernel
    clears its pages again at every step: a fifth of a train step, a third with many experts (docs/performance.md). The
    process then never shrinks below its peak. Where there is a TPU or GPU, or another C library, nothing is done.

    `SWITCHJAX_MALLOPT=0` leaves malloc as it is, with glibc's own variables (`MALLOC_ARENA_MAX` and others), which this
    overrides.
    """
    if os.environ.get("SWITCHJAX_MALLOPT") == "0" or _devices(*_TPUS, *_GPUS):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(_M_TRIM_THRESHOLD, -1)  # the heap's end never goes back
    set_option(_M_MMAP_MAX, 0)  # nothing is a mapping of its own, which goes back when it is freed
    set_option(_M_ARENA_MAX, 1)  # the arenas of further threads are too small for such pieces


def _devices(*patterns: str) -> list[str]:
    return [path for pattern in patterns for path in glob.glob(f"/dev/{pattern}")]
