"""Trains the tiny model in a separate process: `python -m tests.training.small_run CONFIG_JSON --workdir=DIR`."""

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from switchjax import command
from switchjax.config import Config
from switchjax.data.rows import ProcessRows, Row
from switchjax.data.sources import SOURCES
from switchjax.parallel.joining import joined_processes
from switchjax.parallel.mesh import emulate_devices
from switchjax.training.run import train
from tests.stories import small_source


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rows", type=Path, help="where to write the number of each row that this process reads")
    parser.add_argument("--stuck_at", type=int, help="the first row of training that is never read")
    parser.add_argument("--own_workdir", action="store_true", help="as on a host with a disk of its own")
    command.add_process_flags(parser)
    flags = parser.parse_args(arguments)
    SOURCES.update({name: small_source(name, first) for name, first in {"tales": 0, "yarns": 1000}.items()})
    if flags.rows or flags.stuck_at is not None:
        spy(flags.rows, flags.stuck_at)
    config = Config.from_json(flags.config.read_text())
    timeout = config.train.heartbeat_timeout
    with joined_processes(flags.coordinator, flags.process_count, flags.process_index, timeout):
        emulate_devices(config.mesh)
        workdir = flags.workdir.with_name("own") if flags.own_workdir else flags.workdir
        train(config, workdir)


def spy(path: Path | None, stuck_at: int | None) -> None:
    read = ProcessRows.__getitem__

    def watched(self: ProcessRows, index: int) -> Row:
        row = self.global_index(index)
        if path is not None:
            with path.open("a") as file:
                file.write(f"{row}\n")
        if stuck_at is not None and row >= stuck_at:
            time.sleep(1000)
        return read(self, index)

    ProcessRows.__getitem__ = watched


if __name__ == "__main__":
    command.run(main)
