"""How long it takes until a run takes its first step: compiling deep models, and starting with and without a cache."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from switchjax.config import Config
from switchjax.data.prepare import prepare_data
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.markdown import AIM_HEAD, show_row
from switchjax.studies.timing import Ratio, interleaved_seconds
from switchjax.training.run import started_run
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

SHALLOW, DEEP = 2, 12
"""Layers of each stack."""


@contextmanager
def compiled_programs_in(folder: Path | None) -> Iterator[None]:
    """JAX has forgotten what it compiled so far, and keeps what it compiles in `folder`, or for None nowhere."""
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
    """`config` with as many layers in the encoder, and as many in the decoder."""
    model = dataclasses.replace(config.model, num_encoder_layers=layers, num_decoder_layers=layers)
    return dataclasses.replace(config, model=model)


def compile_step(config: Config) -> None:
    """Traces and compiles the train step on all devices, from nothing."""
    jax.clear_caches()
    mesh = make_mesh(config.mesh)
    lower_train_step(config, plan_state(config, mesh), mesh).compile()


def seconds_to_first_step(config: Config) -> float:
    """From prepared data to the end of the first step of a new run."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, started_run(config, Path(folder)) as run:
        run.advance()
        run.settle()
        return time.perf_counter() - started


def benchmark_compile(config: Config, first: Config, repeats: int, report: Callable[[str], None]) -> str:
    """Compiles the step of `SHALLOW` and of `DEEP` stacks in turn, takes first steps, and returns the table.

    Args:
        config: whose layers are many or few.
        first: of the run that is started: without a cache of compiled programs, with an empty one, and with a full one.
        repeats: rounds of compilation, whose medians count; a start is timed once.
        report: is told what goes on.

    Raises:
        UserError: if the data or the devices do not fit.
    """
    starts = _time_starts(first, report)  # before all else, as a user's process has compiled nothing yet
    deep, shallow = (f"{layers} + {layers} layers" for layers in (DEEP, SHALLOW))
    report(f"compiling {shallow} and {deep}, {repeats} rounds")
    with compiled_programs_in(None):
        programs = {
            shallow: lambda: compile_step(with_layers(config, SHALLOW)),
            deep: lambda: compile_step(with_layers(config, DEEP)),
        }
        seconds = interleaved_seconds(programs, repeats, warm_up=False)
    rows = [(f"train step of {name}", f"{statistics.median(seconds[name]):.1f} s", "") for name in programs]
    rows.append((f"{deep} over {shallow}", str(Ratio.of(seconds[deep], seconds[shallow])), "at most 1.3"))
    return "\n".join([*AIM_HEAD, *map(show_row, [*rows, *starts])])


def _time_starts(first: Config, report: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """The table's rows of first steps."""
    prepare_data(first.data)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for cache, aim in (("no cache", "30 s"), ("an empty cache", ""), ("a full cache", "")):
            report(f"a first step with {cache}")
            with compiled_programs_in(None if cache == "no cache" else Path(name)):
                rows.append((f"first step, {cache}", f"{seconds_to_first_step(first):.1f} s", aim))
    return rows
