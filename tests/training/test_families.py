"""Runs of the other families: decoders and LSTMs on text, vision transformers on images, evaluated and resumed."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from switchjax.config import Config, DataConfig, UserError
from switchjax.parallel.mesh import make_mesh
from switchjax.training.evaluation import evaluate_workdir
from switchjax.training.run import train
from switchjax.training.workdir import vocabulary_path
from tests.data import pictures
from tests.models.families import FAMILIES
from tests.tiny import changed, losses

_RUN = {"steps": 4, "log_every": 1, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def decoder(tiny: Config) -> Config:
    """A decoder on packed text, over data 2 x expert 4."""
    data = dataclasses.replace(tiny.data, objective="causal", decoder_length=32, batch_size=16)
    model = dataclasses.replace(FAMILIES["gpt"].model, vocab_size=352, max_length=32)
    moe = dataclasses.replace(FAMILIES["gpt"].moe, group_size=32)
    return changed(dataclasses.replace(tiny, model=model, moe=moe, data=data), train=_RUN)


@pytest.fixture(scope="module")
def vision(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    with pytest.MonkeyPatch.context() as patch:
        pictures.install(patch)
        directory = str(tmp_path_factory.mktemp("images"))
        data = DataConfig("classification", ("tiles",), directory=directory, batch_size=16)
        sizes = {"image_size": 6, "image_channels": 1, "patch_size": 3, "num_classes": 3}
        model = dataclasses.replace(FAMILIES["v_moe"].model, **sizes)
        moe = dataclasses.replace(FAMILIES["v_moe"].moe, group_size=10)
        yield changed(dataclasses.replace(tiny, model=model, moe=moe, data=data), train=_RUN)


def check_run(config: Config, tmp_path: Path) -> None:
    """Four steps equal two steps and two more after a resume; evaluating the workdir gives the results of the run."""
    summary = train(config, tmp_path / "whole")
    train(changed(config, train={"steps": 2}), tmp_path / "halves")
    train(config, tmp_path / "halves")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    evaluation = summary["evaluation"]
    assert math.isfinite(evaluation["neg_log_perplexity"])
    assert 0 <= evaluation["accuracy"] <= 1
    step, results = evaluate_workdir(config, tmp_path / "whole", make_mesh(config.mesh))
    assert step == 4
    assert results == pytest.approx(evaluation)


@pytest.mark.slow
def test_a_decoder_resumes_and_is_evaluated(decoder: Config, tmp_path: Path) -> None:
    check_run(decoder, tmp_path)


@pytest.mark.slow
def test_a_vision_transformer_resumes_and_is_evaluated_and_has_no_vocabulary(vision: Config, tmp_path: Path) -> None:
    check_run(vision, tmp_path)
    assert not vocabulary_path(tmp_path / "whole").exists()


@pytest.mark.slow
def test_an_lstm_learns(decoder: Config, tmp_path: Path) -> None:
    model = dataclasses.replace(FAMILIES["lstm"].model, vocab_size=352)
    moe = dataclasses.replace(FAMILIES["lstm"].moe, group_size=32)
    config = dataclasses.replace(decoder, model=model, moe=moe)
    train(changed(config, train={"steps": 12}), tmp_path)
    assert losses(tmp_path)[12] < losses(tmp_path)[1]


def test_images_of_another_size_or_of_more_classes_are_refused(vision: Config, tmp_path: Path) -> None:
    message = r"tiles: images of \(6, 6, 1\) in 3 classes, but the model is for \(9, 9, 1\) in model.num_classes=3"
    with pytest.raises(UserError, match=message):
        train(changed(vision, model={"image_size": 9}), tmp_path)
    with pytest.raises(UserError, match=r"in model.num_classes=2: set model.image_size"):
        train(changed(vision, model={"num_classes": 2}), tmp_path)
