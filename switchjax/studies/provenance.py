"""Describes where a study's figures come from: command, date, versions and machine."""

import os
import platform
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

_OUTPUTS = ("write", "json", "picture")
"""Flags that name an output and change no figure."""


@dataclass(frozen=True)
class Provenance:
    """Where and when figures were measured."""

    command: str
    date: str
    versions: str
    machine: str
    """Accelerators, usable cores, and the mean load of the last five minutes."""

    def __str__(self) -> str:
        return f"`{self.command}`, {self.date}; {self.versions}; {self.machine}."


def find_provenance(command: str) -> Provenance:
    """The provenance of figures that `command` has just measured."""
    versions = (f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Provenance(
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        machine=", ".join([*_accelerators(), f"{cores} cores of {_processor()}", f"load {os.getloadavg()[1]:.1f}"]),
    )


def command_line(program: str, flags: Namespace, parser: ArgumentParser) -> str:
    """The command line of `program` with those flags that may change its figures and are not at their defaults.

    A `workdir` with a default only says where a study keeps its runs, so it is left out.
    """
    skipped = {*_OUTPUTS, "overrides"} | ({"workdir"} if parser.get_default("workdir") else set())
    words = [program]
    for name, value in vars(flags).items():
        if name not in skipped and value != parser.get_default(name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    return " ".join([*words, *getattr(flags, "overrides", [])])


def _accelerators() -> list[str]:
    devices = [] if jax.default_backend() == "cpu" else jax.devices()
    return [f"{len(devices)} {devices[0].device_kind}"] if devices else []


def _processor() -> str:
    """The processor's model name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
