"""Decoding and train steps beside transformers', and the error if transformers is not installed."""

import sys
from dataclasses import replace

import jax
import pytest

from switchjax.config import UserError
from switchjax.interop.check import import_transformers
from switchjax.studies import beside_transformers, decode_benchmark, step_benchmark
from switchjax.studies.beside_transformers import (
    TransformersDecodeRow,
    TransformersStepRow,
    make_step_config,
    measure_decoding,
    their_program,
)
from switchjax.studies.step_benchmark import train_program
from switchjax.studies.timing import Ratio
from tests.interop.examples import FIXTURES
from tests.studies.written import check_written, measure


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install torch transformers"):
        measure(decode_benchmark, ["--huggingface", str(FIXTURES / "mixtral")], {})
    with pytest.raises(UserError, match=r"pip install torch transformers"):
        measure(step_benchmark, ["--huggingface"], {})


def test_rows_become_the_documents_tables() -> None:
    ratio = Ratio(2.0, 1.5, 2.5)
    ((line,),) = check_written([TransformersDecodeRow("tiny", 8, 20.0, 10.0, ratio, 0.996, 256)], "docs/decoding.md")
    assert line == "| tiny | 8 | 20 | 10 | 2.00 (1.50 to 2.50) | 100 % |"
    rows = [TransformersStepRow(experts, 0.1, 2560, 2e4, 1e4, ratio) for experts in (0, 8)]
    ((dense, sparse),) = check_written(rows, "docs/performance.md")
    assert dense == "| dense | 0.1 | 2,560 | 20,000 | 10,000 | 2.00 (1.50 to 2.50) |"
    assert sparse.startswith("| 8 | 0.1 |")


@pytest.mark.parametrize("name", ["mixtral", "t5_v1_1"])
def test_both_write_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(beside_transformers, "ROWS", (2,))
    (row,) = measure_decoding([FIXTURES / name], 6, 1)
    assert row.fraction_alike == 1


@pytest.mark.slow
def test_both_learn_the_same_batch_from_the_same_loss() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = make_step_config(4, 0.0)
    model = replace(config.model, d_model=32, d_ff=64, num_encoder_layers=2, num_decoder_layers=2, vocab_size=64)
    data = replace(config.data, batch_size=4, encoder_length=16, decoder_length=8)
    config = replace(config, model=model, data=data)
    ours, theirs = train_program(config, jax.devices()[:1]), their_program(config, import_transformers())
    losses: dict[str, list[float]] = {"here": [], "there": []}
    for _ in range(30):
        losses["here"].append(float(jax.device_get(ours())["loss"]))
        losses["there"].append(theirs())
    for values in losses.values():
        assert values[-1] < values[0] - 0.5, "it does not learn"
