"""Both sides of the ratio count tokens in the same way, and the study measures every figure."""

import jax
import pytest

from switchjax.config import Config, TrainConfig
from switchjax.data.text import TextData
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import place_batch
from switchjax.studies import input_benchmark
from switchjax.studies.input_benchmark import Consumer, InputFigures, count_tokens, fraction_beside_steps
from switchjax.studies.timing import Ratio
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step
from tests.studies.written import check_written, measure


@pytest.mark.slow
def test_the_pipelines_tokens_are_those_that_steps_count(tiny: Config) -> None:
    mesh = make_mesh(tiny.mesh)
    plan = plan_state(tiny, mesh)
    with jax.set_mesh(mesh):
        compiled = lower_train_step(tiny, plan, mesh).compile()
        batches = TextData.prepare(tiny.data).train_batches()
        consumer = Consumer(batches, lambda batch: place_batch(batch, mesh), compiled, plan.create())
        for batch in (next(batches), next(batches)):
            assert consumer.step(batch) == count_tokens(batch) <= 24 * (96 + 32)
        assert 0 < consumer.train(2) < 1
    assert int(consumer.state.step) == 4
    assert all(tokens > 24 * 32 for tokens in consumer.read(2))


def test_laps_count_by_how_long_they_take() -> None:
    # Steps take 1 s a lap: the first lap lasts 1.25 s, the second, with a checkpoint, 2 s.
    laps = [
        {"step_fraction": 0.8, "data_wait_fraction": 0.1},
        {"step_fraction": 0.5, "data_wait_fraction": 0.0},
    ]
    assert fraction_beside_steps(laps) == pytest.approx((0.125 + 1.0) / 3.25)


@pytest.mark.slow
def test_every_figure_is_measured(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_benchmark, "BATCHES", 3)
    monkeypatch.setattr(input_benchmark, "STEPS", 1)
    monkeypatch.setattr(input_benchmark, "RUN", TrainConfig(steps=6, log_every=2, checkpoint_every=2))
    (found,) = measure(input_benchmark, ["--repeats=2"], {"quickstart.py:switch": tiny})
    assert min(found.pipeline_tokens_per_second, found.step_tokens_per_second, found.ready_seconds) > 0
    assert 0 < found.pipeline_over_step.low <= found.pipeline_over_step.high
    assert 0 <= found.data_wait_fraction < 1
    assert 0 < found.loop_fraction < 1


def test_figures_become_the_documents_table() -> None:
    figures = InputFigures(437608.4, 15449.0, Ratio(28.3, 27.6, 29.6), 0.0011, 0.07, 0.011)
    (lines,) = check_written([figures], "docs/performance.md")
    assert lines[2] == "| pipeline over step | 28.30 (27.60 to 29.60) | at least 10 |"
    assert lines[-1] == "| logging every 20 steps, a checkpoint every 100, the loop | 1.10 % | below 2 % |"
