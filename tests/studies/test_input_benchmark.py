"""Tokens are counted alike on both sides of the ratio, and every figure has its row."""

import jax
import pytest

from switchjax.config import Config, TrainConfig
from switchjax.data.text import TextData
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import place_batch
from switchjax.studies import input_benchmark
from switchjax.studies.input_benchmark import Consumer, benchmark_input, count_tokens, fraction_beside_steps
from switchjax.studies.markdown import read_tables
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step


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
def test_the_table_has_every_figure(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_benchmark, "BATCHES", 3)
    monkeypatch.setattr(input_benchmark, "STEPS", 1)
    monkeypatch.setattr(input_benchmark, "RUN", TrainConfig(steps=6, log_every=2, checkpoint_every=2))
    _, read, eaten, ratio, wait, ready, loop = read_tables(benchmark_input(tiny, 2, report=lambda line: None))[0]
    assert float(read[1].replace(",", "")) > 0 < float(eaten[1].replace(",", ""))
    assert float(ratio[1].split(" ")[0]) > 0
    assert 0 <= float(wait[1].removesuffix(" %")) <= 100
    assert ready[1].endswith(" s")
    assert 0 < float(loop[1].removesuffix(" %")) < 100
