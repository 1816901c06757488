"""Times what precedes a run's first step: compiling few layers and many, starting with and without a cache."""

import dataclasses
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
from jax.experimental.compilation_cache import compilation_cache

from switchjax.config import Config
from switchjax.data.prepare import prepare_data
from switchjax.parallel.mesh import emulate_devices, make_mesh
from switchjax.studies.flags import LoadConfig, add_repeats
from switchjax.studies.report import Figure
from switchjax.studies.timing import Ratio, interleaved_seconds
from switchjax.training.run import started_run
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

SHALLOW, DEEP = 2, 12
"""Layers of each stack."""
_FEW, _MANY = (f"{layers} + {layers} layers" for layers in (SHALLOW, DEEP))


@dataclass(frozen=True)
class CompileFigures:
    """Median times of compiling a train step, and single times of a first step."""

    shallow_seconds: Annotated[float, Figure(f"train step of {_FEW}", "{:.1f} s".format)]
    deep_seconds: Annotated[float, Figure(f"train step of {_MANY}", "{:.1f} s".format)]
    deep_over_shallow: Annotated[Ratio, Figure(f"{_MANY} over {_FEW}", aim="at most 1.3")]
    uncached_start_seconds: Annotated[float, Figure("first step, no cache", "{:.1f} s".format, aim="30 s")]
    empty_cache_start_seconds: Annotated[float, Figure("first step, an empty cache", "{:.1f} s".format)]
    full_cache_start_seconds: Annotated[float, Figure("first step, a full cache", "{:.1f} s".format)]


def add_flags(parser: ArgumentParser) -> None:
    add_repeats(parser, 7)


def measure(flags: Namespace, load: LoadConfig) -> Iterator[CompileFigures]:
    """Starts the quickstart's run, then compiles small Switch Transformers of `SHALLOW` and `DEEP` stacks in turn."""
    config, first = load("configs/switch.py:runlocal"), load("configs/quickstart.py:switch")
    emulate_devices(config.mesh)
    starts = _time_starts(first)  # first of all: a user's process has compiled nothing yet
    programs = {
        "shallow": lambda: compile_step(with_layers(config, SHALLOW)),
        "deep": lambda: compile_step(with_layers(config, DEEP)),
    }
    with compiled_programs_in(None):
        seconds = interleaved_seconds(programs, flags.repeats, warm_up=False)
    shallow, deep = seconds["shallow"], seconds["deep"]
    yield CompileFigures(statistics.median(shallow), statistics.median(deep), Ratio.of(deep, shallow), *starts)


@contextmanager
def compiled_programs_in(folder: Path | None) -> Iterator[None]:
    """A context in which JAX forgets earlier programs and keeps new ones in `folder`, or nowhere if it is None."""
    before = jax.config.values["jax_compilation_cache_dir"]

    def keep_in(directory: str | None) -> None:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()
        jax.clear_caches()

    keep_in(None if folder is None else str(folder))
    try:
        yield
    finally:
        keep_in(before)


def with_layers(config: Config, layers: int) -> Config:
    """`config` with `layers` encoder layers and `layers` decoder layers."""
    model = dataclasses.replace(config.model, num_encoder_layers=layers, num_decoder_layers=layers)
    return dataclasses.replace(config, model=model)


def compile_step(config: Config) -> None:
    """Traces and compiles the train step on all devices, without reusing anything."""
    jax.clear_caches()
    mesh = make_mesh(config.mesh)
    lower_train_step(config, plan_state(config, mesh), mesh).compile()


def _time_starts(config: Config) -> list[float]:
    """Seconds from prepared data to the end of a run's first step: without a cache, with an empty one, a full one."""
    prepare_data(config.data)
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        for cache in (None, Path(name), Path(name)):
            with compiled_programs_in(cache), tempfile.TemporaryDirectory() as workdir:
                started = time.perf_counter()
                with started_run(config, Path(workdir)) as run:
                    run.advance()
                    run.settle()
                    seconds.append(time.perf_counter() - started)
    return seconds
