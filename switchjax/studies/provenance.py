"""Where the figures of a table come from."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax


def origin(command: str) -> dict[str, str]:
    """Where and when figures come from: command, date, versions, machine and how busy that has been."""
    versions = (f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    cores = f"{_usable_cores()} cores of {_processor()}"
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "machine": ", ".join([*_accelerators(), cores, f"load {os.getloadavg()[1]:.1f}"]),
    }


def show_origin(found: dict[str, str]) -> str:
    """`origin` as the line below a table."""
    return f"`{found['command']}`, {found['date']}; {found['versions']}; {found['machine']}."


def _accelerators() -> list[str]:
    devices = [] if jax.default_backend() == "cpu" else jax.devices()
    return [f"{len(devices)} {devices[0].device_kind}"] if devices else []


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's own name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
