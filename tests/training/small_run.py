"""Trains the tiny model in a process of its own: `python -m tests.training.small_run CONFIG_JSON WORKDIR`."""

import logging
import sys
from pathlib import Path

from switchjax.config import Config
from switchjax.data.sources import SOURCES
from switchjax.inference.evaluation import perplexity_evaluator
from switchjax.parallel.mesh import emulate_devices
from switchjax.training.loop import train
from tests.stories import small_source


def main(config_path: str, workdir: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    SOURCES.update({name: small_source(name, first) for name, first in {"tales": 0, "yarns": 1000}.items()})
    config = Config.from_json(Path(config_path).read_text())
    emulate_devices(config.mesh)
    train(config, Path(workdir), perplexity_evaluator)


if __name__ == "__main__":
    main(*sys.argv[1:])
