"""Tables that a command puts into a document or a JSON file, so that no figure in it is older than its command."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

from switchjax.config import UserError


def write_table(path: Path, command: str, table: str) -> None:
    """Puts `table` between the two marks of `command` in a document.

    Raises:
        UserError: if the document does not have them.
    """
    start, end = f"<!-- {command} -->\n", "<!-- end -->"
    text = path.read_text() if path.exists() else ""
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no lines '{start.strip()}' and '{end}' to put the table between")
    path.write_text(f"{before}{start}{table}\n{end}{after}")


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


def read_tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, row by row, those of its head first."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not all(set(cell) <= set("-:") and cell for cell in cells):
            tables[-1].append(cells)
    return tables
