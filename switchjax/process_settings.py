"""Settings of a script's own process. Each function changes one behaviour of a library and says why.

| function | called by | disabled by |
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
    # orbax logs errors of its background threads and then raises them too.
    "absl": r"\[process=\w+\].*(_SignalingThread\.run\(\) raised an exception"
    r"|Failed to run \d+ Handler Commit operations"
    r"|Save Finalize thread \(\w+\) failed)"
    # A checkpoint that is only read is opened read-only on purpose.
    r"|Given directory is read only=",
    # asyncio logs the errors of orbax's other reads and writes after one has failed.
    "asyncio": r"(Task|Future|_GatheringFuture) exception was never retrieved.*(orbax|tensorstore)",
}
"""Logger -> pattern of the messages about orbax to hide."""


def log_to_stderr() -> None:
    """Prints the log lines of this package and the warnings and errors of all others, without a prefix."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("switchjax").setLevel(logging.INFO)


def hide_repeated_checkpoint_errors() -> None:
    """Hides what orbax prints about a failed read or write besides the error that it raises.

    We report a damaged checkpoint or a full disk in one line. orbax adds up to hundreds of tracebacks of that error:
    it logs what it raises, and ends its event loop during other reads and writes, which then fail in turn. Failures in
    tensorstore's threads reach Python only through `sys.unraisablehook`, so this function replaces that hook. All other
    messages of orbax, absl and asyncio appear.

    `SWITCHJAX_SHOW_ALL_ERRORS=1` shows all of them.
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
    """A filter that hides messages that match a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None


def stand_in_for_tpu_metadata() -> None:
    """Gives libtpu, on a machine without TPUs, the values that it would request from the metadata server of a TPU.

    libtpu may be installed only for planning; it would wait for the server and then complain. Variables that are set
    already stay.
    """
    if not _devices(*_TPUS):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, for the next process that needs the same ones.

    JAX's own variables take precedence: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = user_cache() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, because JAX runs what it finds there
    except OSError:
        return
    if os.access(folder, os.W_OK):  # otherwise JAX would warn about every program
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # A start compiles a hundred small programs, most of them in less than JAX's minimum of a second.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory instead of returning it to the kernel; only on CPUs.

    On the CPU, XLA allocates a program's temporaries as one piece at each call. If malloc returned the piece each time,
    the kernel would clear its pages at every step: a fifth of a train step, a third with many experts
    (docs/performance.md). The price is that the process never shrinks below its peak. With a TPU, a GPU or another C
    library, this function does nothing.

    `SWITCHJAX_MALLOPT=0` leaves malloc unchanged, with glibc's own variables (`MALLOC_ARENA_MAX` and others), which
    this function overrides.
    """
    if os.environ.get("SWITCHJAX_MALLOPT") == "0" or _devices(*_TPUS, *_GPUS):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(_M_TRIM_THRESHOLD, -1)  # never return the end of the heap
    set_option(_M_MMAP_MAX, 0)  # no separate mappings, which return to the kernel when freed
    set_option(_M_ARENA_MAX, 1)  # one arena, because those of further threads are too small for such pieces


def _devices(*patterns: str) -> list[str]:
    return [path for pattern in patterns for path in glob.glob(f"/dev/{pattern}")]
