"""Trains a model; resumes from the last checkpoint of the workdir. On SIGTERM, saves a checkpoint and stops.

python scripts/train.py --config=configs/switch.py:base-8 --workdir=runs/base_8 [--config.train.steps=500 ...]

--config.train.trace_steps=5 writes a profiler's trace of steps 10 to 14. Compiled programs are kept in the user's cache
folder: JAX_COMPILATION_CACHE_DIR=DIR chooses another folder, JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
For several processes, on one host or many, see docs/processes.md.
"""

import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from switchjax import command, process_settings
from switchjax.config import Config
from switchjax.training.preemption import exit_at_once


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="folder for config, checkpoints and metrics")
    code = "exit code of a run that SIGTERM stops early; default: 0, which some schedulers take for complete"
    parser.add_argument("--interrupted_exit_code", type=int, default=0, metavar="CODE", help=code)
    command.add_process_flags(parser)
    flags, config = command.parse_with_config(parser, arguments)
    # Handles SIGTERM during imports and after the last save; `train` installs its own handler between them.
    signal.signal(signal.SIGTERM, lambda number, frame: exit_at_once(flags.interrupted_exit_code))

    process_settings.keep_freed_memory()

    from switchjax.parallel.joining import joined_processes

    timeout = config.train.heartbeat_timeout
    with joined_processes(flags.coordinator, flags.process_count, flags.process_index, timeout):
        interrupted = _train(config, flags)
    if interrupted:
        sys.exit(flags.interrupted_exit_code)


def _train(config: Config, flags: Namespace) -> bool:
    """Trains; returns True if SIGTERM has stopped the run before its end."""
    from switchjax.parallel.mesh import emulate_devices
    from switchjax.parallel.processes import process_index
    from switchjax.training.run import train

    emulate_devices(config.mesh)
    if process_index() == 0:
        print(config.to_json(), flush=True)
    summary = train(config, flags.workdir, flags.interrupted_exit_code)
    interrupted = bool(summary.get("interrupted"))
    if process_index() == 0:
        if interrupted:
            print(f"stopped at step {summary['steps']} of {config.train.steps}; the same command resumes")
        else:
            print(f"done: {summary['steps']} steps; held-out {summary['evaluation']}")
    return interrupted


if __name__ == "__main__":
    command.run(main)
