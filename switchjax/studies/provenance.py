"""Says where the figures of a study come from."""

import os
import platform
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

_OUTPUTS = ("write", "json", "picture")
"""Flags that say where to write, and change no figure."""


@dataclass(frozen=True)
class Provenance:
    """Where and when figures were measured."""

    command: str
    date: str
    versions: str
    machine: str
    """Accelerators, usable cores, and the load of the last five minutes."""

    def __str__(self) -> str:
        return f"`{self.command}`, {self.date}; {self.versions}; {self.machine}."


def find_provenance(command: str) -> Provenance:
    """The provenance of figures that `command` has measured by now."""
    versions = (f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    cores = f"{_usable_cores()} cores of {_processor()}"
    return Provenance(
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        machine=", ".join([*_accelerators(), cores, f"load {os.getloadavg()[1]:.1f}"]),
    )


def command_line(program: str, flags: Namespace, parser: ArgumentParser) -> str:
    """The command whose figures these are: `program` with every flag that may change them and is not at its default.

    Args:
        program: as it is called, before its flags.
        flags: as parsed; `overrides` of a config, if there are any, are words as they were given.
        parser: knows the defaults. Where it has one for `workdir`, that only says where the runs of a study lie.
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
