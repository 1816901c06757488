"""Every config file builds, has the published size, and trains in its `runlocal` form on real text."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from switchjax.analysis.parameters import count_parameters
from switchjax.config import Config, UserError
from switchjax.inference.evaluation import perplexity_evaluator
from switchjax.training.loop import train
from tests.tiny import losses

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"), key=lambda path: path.stem)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(name: str, arg: str) -> Config:
    path = next(path for path in FILES if path.stem == name)
    return Config.from_dict(load(path).get_config(arg))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_default_builds_the_docstring_names_the_command_and_a_wrong_size_is_refused(path: Path) -> None:
    module = load(path)
    Config.from_dict(module.get_config())
    assert f"configs/{path.name}" in (module.__doc__ or "")
    with pytest.raises(UserError, match="runlocal"):
        module.get_config("no-such-size-at-all")


@pytest.mark.parametrize(
    ("name", "arg", "published"),
    [
        # PAPERS: T5 and the released Switch checkpoints.
        ("t5", "base", 222.90e6),
        ("t5", "large", 737.67e6),
        ("t5", "xxl", 11.1e9),
        ("switch", "base-8", 619_339_008),
        ("switch", "base-128", 7_415_217_408),
        ("switch", "large-128", 26.3e9),
        ("switch", "xxl-128", 395e9),
        ("switch", "c", 1571e9),
    ],
)
def test_parameters_are_within_one_percent_of_the_published(name: str, arg: str, published: float) -> None:
    assert count_parameters(config_of(name, arg)).total == pytest.approx(published, rel=0.01)


def test_the_quickstart_models_meet_a_token_with_the_same_parameters_but_for_the_router() -> None:
    switch, dense = (config_of("quickstart", arg) for arg in ("switch", "dense"))
    routers = (switch.model.num_encoder_layers + switch.model.num_decoder_layers) // 2
    routers *= switch.model.d_model * switch.moe.num_experts
    assert count_parameters(switch).active == count_parameters(dense).total + routers
    assert count_parameters(dense).active == count_parameters(dense).total


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_runlocal_trains_two_steps_on_real_text(path: Path, tmp_path: Path) -> None:
    config = Config.from_dict(load(path).get_config("runlocal"))
    summary = train(config, tmp_path, perplexity_evaluator)
    assert summary["steps"] == 2
    assert summary["corpora"] == ["kjv"]
    assert set(losses(tmp_path)) == {1, 2}
