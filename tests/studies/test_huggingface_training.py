"""Train steps beside transformers': both learn where it is installed, and what is said where it is not."""

import sys
from dataclasses import replace

import jax
import pytest

from switchjax.config import UserError
from switchjax.interop.check import import_transformers
from switchjax.studies.huggingface_training import benchmark_beside_transformers, make_config, their_program
from switchjax.studies.step_benchmark import train_program


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install torch transformers"):
        benchmark_beside_transformers(1, print)


@pytest.mark.slow
def test_both_learn_the_same_batch_from_the_same_loss() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = make_config(4, 0.0)
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
