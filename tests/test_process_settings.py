"""What the scripts set for their process: it works, it can be switched off, and nothing else is hidden by it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


ON_A_FULL_DISK = """
import sys
from pathlib import Path
import jax
import orbax.checkpoint as ocp
from switchjax import process_settings
from tests.training.full_disk import full_disk

process_settings.log_to_stderr()
process_settings.hide_repeated_checkpoint_errors()
weights = {f"w{number}": jax.numpy.ones(1000) for number in range(50)}
for attempt in range(3):
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    try:
        with full_disk(1000):
            checkpointer.save(Path(sys.argv[1]).absolute() / str(attempt), weights)
            checkpointer.wait_until_finished()
    except Exception as error:
        print("raised")
"""


def test_an_error_that_orbax_raises_is_not_printed_as_well_unless_asked_for(tmp_path: Path) -> None:
    hidden = run(ON_A_FULL_DISK, str(tmp_path / "hidden"))
    assert hidden.stdout == "raised\n" * 3
    assert hidden.stderr == ""
    shown = run(ON_A_FULL_DISK, str(tmp_path / "shown"), SWITCHJAX_SHOW_ALL_ERRORS="1")
    assert "Traceback" in shown.stderr
    assert "File too large" in shown.stderr


OTHER_MESSAGES = """
import logging, warnings
from switchjax import process_settings

process_settings.log_to_stderr()
process_settings.hide_repeated_checkpoint_errors()
logging.getLogger("absl").warning("Metadata file does not exist")
logging.getLogger("asyncio").error("Task exception was never retrieved, of another library's task")
warnings.warn("from a library")

class Loud:
    def __del__(self):
        raise RuntimeError("in a destructor")

Loud()
"""


def test_all_other_messages_are_visible() -> None:
    shown = run(OTHER_MESSAGES).stderr
    for message in ("Metadata file", "another library's task", "UserWarning: from a library", "in a destructor"):
        assert message in shown


def compilation_cache(home: Path, **environment: str) -> list[str]:
    """Where a script has JAX keep what it compiles, and whether it does."""
    code = (
        "from switchjax import command\n"
        "def main(arguments):\n"
        "    import jax\n"
        "    print(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)\n"
        "command.run(main)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "XDG_CACHE"))}
    environment = kept | {"HOME": str(home)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_scripts_keep_compiled_programs_in_the_users_cache_unless_told_otherwise(tmp_path: Path) -> None:
    default = tmp_path / ".cache" / "switchjax" / "compiled"
    assert compilation_cache(tmp_path, JAX_COMPILATION_CACHE_DIR="/elsewhere") == ["/elsewhere", "True"]
    assert not default.exists()
    assert compilation_cache(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[1] == "False"
    assert compilation_cache(tmp_path) == [str(default), "True"]
    assert default.stat().st_mode & 0o077 == 0


def test_without_a_cache_folder_scripts_run_all_the_same(tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("")
    assert compilation_cache(tmp_path) == ["None", "True"]


PIECES = """
import ctypes, resource
from switchjax import process_settings

process_settings.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = libc.malloc(2**28)
    ctypes.memset(piece, 1, 2**28)
    libc.free(ctypes.c_void_p(piece))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_memory_that_is_freed_is_not_cleared_by_the_kernel_again_unless_switched_off() -> None:
    """Pages that the kernel hands out for a piece of 256 MiB, as XLA asks for at each step, the second time."""
    assert int(run(PIECES).stdout) < 100
    assert int(run(PIECES, SWITCHJAX_MALLOPT="0").stdout) > 1000
