"""Held-out evaluation equals a sum by hand, twice and from a checkpoint on another mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, MeshConfig, UserError
from switchjax.data.text import TextData
from switchjax.parallel.mesh import make_mesh
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.evaluation import Evaluator, evaluate_workdir, load_model
from switchjax.training.state import TrainState, plan_state
from switchjax.training.workdir import vocabulary_path
from tests.tiny import changed


@pytest.fixture(scope="module")
def data(tiny: Config) -> TextData:
    return TextData.prepare(tiny.data)


@pytest.fixture(scope="module")
def state(tiny: Config) -> TrainState:
    return plan_state(tiny, make_mesh(tiny.mesh)).create()


@pytest.fixture(scope="module")
def results(tiny: Config, data: TextData, state: TrainState) -> dict[str, float]:
    mesh = make_mesh(tiny.mesh)
    with jax.set_mesh(mesh):
        evaluator = Evaluator(tiny, data, mesh)
        once, again = (evaluator(state.model) for _ in range(2))
    assert once == again
    return once


def test_it_is_the_mean_log_likelihood_of_target_tokens(
    tiny: Config, data: TextData, state: TrainState, results: dict[str, float]
) -> None:
    model = jax.device_put(jax.device_get(state.model), jax.devices()[0])
    totals = {}
    for corpus in data.corpora:
        (batch,) = data.evaluation_batches(corpus, "validation", limit=1)
        logits, _ = jax.jit(lambda model, batch: model(batch, None))(model, batch)
        log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
        chosen = np.take_along_axis(log_probs, batch["decoder_targets"][..., None], axis=-1)[..., 0]
        mask = batch["decoder_segments"] > 0
        totals[corpus] = chosen[mask].sum(), mask.sum()
        assert results[f"neg_log_perplexity/{corpus}"] == pytest.approx(chosen[mask].mean(), rel=1e-5)
    log_likelihood, tokens = map(sum, zip(*totals.values(), strict=True))
    assert results["neg_log_perplexity"] == pytest.approx(log_likelihood / tokens, rel=1e-5)
    assert results["target_tokens"] == tokens
    assert 0 <= results["fraction_tokens_dropped"] < 1


def test_a_fresh_model_is_about_as_good_as_guessing(tiny: Config, results: dict[str, float]) -> None:
    assert results["neg_log_perplexity"] == pytest.approx(-np.log(tiny.model.vocab_size), abs=1.0)


def test_a_dense_model_drops_nothing_and_says_nothing_of_it(tiny: Config, data: TextData) -> None:
    dense = changed(tiny, model={"pattern": ("dense",)})
    mesh = make_mesh(dense.mesh)
    with jax.set_mesh(mesh):
        results = Evaluator(dense, data, mesh)(plan_state(dense, mesh).create().model)
    assert "fraction_tokens_dropped" not in results


def test_a_checkpoint_gives_the_same_on_one_device(
    tiny: Config, data: TextData, state: TrainState, results: dict[str, float], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {"fingerprint": data.fingerprint}, tiny)
    checkpoints.close()
    vocabulary_path(tmp_path).write_bytes(data.vocabulary.model)
    step, again = evaluate_workdir(tiny, tmp_path, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert step == 0
    assert again == pytest.approx(results, rel=1e-5)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")], ids=["missing", "cut"])
def test_a_checkpoint_that_does_not_say_of_its_data_is_passed_over(
    tiny: Config, data: TextData, state: TrainState, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        stepped = dataclasses.replace(state, step=state.step + step)
        checkpoints.save(stepped, {"fingerprint": data.fingerprint}, tiny)
    checkpoints.close()
    vocabulary_path(tmp_path).write_bytes(data.vocabulary.model)
    damage(tmp_path / "checkpoints" / "2" / "data" / "metadata")
    mesh = make_mesh(tiny.mesh)
    assert evaluate_workdir(tiny, tmp_path, mesh)[0] == 1
    with pytest.raises(UserError, match=r"checkpoint 2 in .* cannot be read"):
        evaluate_workdir(tiny, tmp_path, mesh, 2)


def test_a_workdir_without_a_checkpoint_is_refused(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_model(tiny, tmp_path, make_mesh(tiny.mesh))
