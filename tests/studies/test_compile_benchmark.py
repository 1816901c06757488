"""What is timed is compiled from nothing, or loaded where that is said."""

from pathlib import Path

import jax
import pytest

from switchjax.config import Config
from switchjax.studies import compile_benchmark
from switchjax.studies.compile_benchmark import (
    benchmark_compile,
    compile_step,
    compiled_programs_in,
    seconds_to_first_step,
    with_layers,
)
from switchjax.studies.markdown import read_tables


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
def test_a_step_is_compiled_and_a_first_step_taken(tiny: Config) -> None:
    compile_step(tiny)
    assert 0 < seconds_to_first_step(tiny) < 300


def test_the_table_compares_deep_and_shallow_models(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(
        compile_benchmark, "compile_step", lambda config: compiled.append(config.model.num_encoder_layers)
    )
    starts = iter([3.0, 4.0, 1.0])
    caches: list[str | None] = []

    def start(config: Config) -> float:
        caches.append(jax.config.jax_compilation_cache_dir)
        return next(starts)

    monkeypatch.setattr(compile_benchmark, "seconds_to_first_step", start)
    table = read_tables(benchmark_compile(tiny, tiny, 2, report=lambda line: None))[0]
    assert compiled == [2, 12, 2, 12]
    assert [row[1] for row in table[-3:]] == ["3.0 s", "4.0 s", "1.0 s"]
    assert caches[0] is None
    assert caches[1] == caches[2] is not None
