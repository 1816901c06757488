"""Parity: our models compute the same as transformers' own, from the same files."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from switchjax.config import Config
from switchjax.interop.convert import huggingface_tensors
from switchjax.models.model import Batch, Model
from switchjax.training.objective import count_batch, objective, sum_over_targets
from tests.interop.examples import FIXTURES, MODELS, expected, load_fixture

DROPPING = ("switch", "switch_deep")


def our_batch(inputs: dict[str, np.ndarray], prefix: str = "") -> Batch:
    def ids(name: str) -> np.ndarray:
        return inputs[prefix + name].astype(np.int32)

    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].transpose(0, 2, 3, 1)
        return {"images": np.round((pixels + 1) * 127.5).astype(np.uint8), "labels": np.zeros(len(pixels), np.int32)}
    if "decoder_input_ids" not in inputs:
        return {"decoder_inputs": ids("input_ids"), "decoder_segments": ids("attention_mask")}
    return {
        "encoder_tokens": ids("input_ids"),
        "encoder_segments": ids("attention_mask"),
        "decoder_inputs": ids("decoder_input_ids"),
        "decoder_segments": ids("decoder_attention_mask"),
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    _, model = load_fixture(name)
    inputs = expected(name)
    batch = our_batch(inputs)
    logits, reports = jax.jit(lambda model, batch: model(batch, None))(model, batch)
    wanted = inputs["logits"].reshape(logits.shape)
    real = np.ones((len(wanted), 1), bool) if "images" in batch else batch["decoder_segments"] > 0
    assert np.abs(wanted[real]).max() > 0.5
    assert "images" in batch or not real.all()
    # Sums in float32 in another order: 1e-6 of logits of some units, through a few layers.
    np.testing.assert_allclose(np.asarray(logits)[real], wanted[real], atol=1e-4, rtol=0)
    metrics = [report.metrics for report in reports.values() if report.metrics is not None]
    dropped = sum(float(np.sum(layers.routed - layers.dispatched)) for layers in metrics)
    assert (dropped > 0) == (name in DROPPING)


def total_loss(config: Config, model: Model, batch: Batch) -> jax.Array:
    """The training objective without noise and without the z-loss on logits, which transformers lacks."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, z_loss_weight=0.0))
    return objective(config, sum_over_targets(config, model, batch, None), count_batch(model, batch)).total


@pytest.mark.parametrize("name", ["switch", "mixtral"])
def test_loss_and_gradients_equal_those_of_transformers(name: str) -> None:
    config, model = load_fixture(name)
    inputs = expected(name)
    batch = our_batch(inputs, "full/") | {"decoder_targets": inputs["full/targets"].astype(np.int32)}
    loss, gradient = jax.jit(jax.value_and_grad(lambda model, batch: total_loss(config, model, batch)))(model, batch)
    wanted: dict[str, Any] = json.loads((FIXTURES / name / "expected.json").read_text())
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
    weights = load_file(FIXTURES / name / "model.safetensors")
    gradients = dict(huggingface_tensors(gradient, config))
    assert gradients.keys() == wanted["gradients"].keys()
    for key, (norm, product) in wanted["gradients"].items():
        # Sums in float32 in another order.
        np.testing.assert_allclose(np.linalg.norm(gradients[key]), norm, rtol=1e-4, atol=1e-6, err_msg=key)
        scale = norm * float(np.linalg.norm(weights[key]))
        np.testing.assert_allclose(np.sum(gradients[key] * weights[key]), product, atol=1e-4 * scale, err_msg=key)
    assert sum("expert" in key and norm > 0 for key, (norm, _) in wanted["gradients"].items()) > 4
