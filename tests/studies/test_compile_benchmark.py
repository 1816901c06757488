"""Timed programs are compiled from nothing, or loaded from the cache that is named."""

from pathlib import Path

import jax
import pytest

from switchjax.config import Config
from switchjax.studies import compile_benchmark
from switchjax.studies.compile_benchmark import CompileFigures, compiled_programs_in, with_layers
from switchjax.studies.timing import Ratio
from tests.studies.written import check_written, measure


def test_programs_are_kept_where_it_is_said_and_nowhere_else(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir

    def entries() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("*-cache"))

    def compile_one() -> None:
        jax.jit(lambda x: 3 * x + 41)(1.0)

    with compiled_programs_in(None):
        compile_one()
    assert not entries()
    with compiled_programs_in(tmp_path):
        compile_one()
    first = entries()
    assert first
    with compiled_programs_in(tmp_path):
        compile_one()
    assert entries() == first
    assert jax.config.jax_compilation_cache_dir == before


def test_only_the_number_of_layers_differs(tiny: Config) -> None:
    deep = with_layers(tiny, 12)
    assert deep.model.stacks == {"encoder": 12, "decoder": 12}
    assert with_layers(deep, 2) == tiny


@pytest.mark.slow
def test_stacks_are_compiled_and_runs_started(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_benchmark, "DEEP", 4)
    (found,) = measure(compile_benchmark, ["--repeats=1"], {"switch.py:runlocal": tiny, "quickstart.py:switch": tiny})
    assert min(found.shallow_seconds, found.deep_seconds) > 0
    assert found.deep_over_shallow.median == found.deep_seconds / found.shallow_seconds
    # With a full cache, the step is not compiled again.
    assert 0 < found.full_cache_start_seconds < found.uncached_start_seconds


def test_figures_become_the_documents_table() -> None:
    figures = CompileFigures(1.0, 1.25, Ratio(1.25, 1.2, 1.3), 30.0, 31.0, 2.0)
    (lines,) = check_written([figures], "docs/performance.md")
    assert lines[2:4] == [
        "| 12 + 12 layers over 2 + 2 layers | 1.25 (1.20 to 1.30) | at most 1.3 |",
        "| first step, no cache | 30.0 s | 30 s |",
    ]
