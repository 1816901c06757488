"""Every config file builds in every size, has the published size, and trains in its `runlocal` form on real data."""

import importlib.util
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import pytest

from switchjax.accounting.accounting import account
from switchjax.accounting.published import PUBLISHED, TOLERANCE, published_figures
from switchjax.config import Config, UserError
from switchjax.models.families import build
from switchjax.models.parameters import count_trained
from switchjax.training.run import train
from tests.tiny import losses

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"), key=lambda path: path.stem)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path) for path in FILES}
SYSTEMS = sorted({key.split(":")[0] for key in PUBLISHED})


def config_of(name: str, arg: str) -> Config:
    return Config.from_dict(MODULES[name].get_config(arg))


@pytest.mark.parametrize("name", MODULES)
def test_the_default_builds_the_docstring_names_the_command_and_a_wrong_size_is_refused(name: str) -> None:
    module = MODULES[name]
    Config.from_dict(module.get_config())
    assert f"configs/{name}.py" in (module.__doc__ or "")
    with pytest.raises(UserError, match="runlocal"):
        module.get_config("no-such-size-at-all")


@pytest.mark.parametrize("name", MODULES)
def test_the_docstring_names_every_size(name: str) -> None:
    # A dense twin goes by its model's name.
    named = set(re.findall(r"[\w.-]*\w", MODULES[name].__doc__ or ""))
    assert {size.removesuffix("-dense") for size in MODULES[name].SIZES} <= named


@pytest.mark.parametrize("name", MODULES)
def test_every_weight_of_every_size_is_accounted_for_under_a_known_part(name: str) -> None:
    for size in (*MODULES[name].SIZES, "runlocal"):
        config = config_of(name, size)
        model = jax.eval_shape(partial(build, config), jax.random.key(0))
        accounting = account(config)
        assert accounting.total == count_trained(model), size
        assert "other" not in {**accounting.parameters, **accounting.computed_flops}, size


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_size_agrees_with_the_published_figures_or_the_note_says_why(name: str) -> None:
    for key, published in PUBLISHED.items():
        system, size = key.split(":")
        if system == name:
            figures = published_figures(key, config_of(system, size))
            assert [found for found in figures if not found.agrees] == []
            assert "total" in [found.figure for found in figures]
            assert published.note or all(tolerance <= TOLERANCE for tolerance in published.tolerance.values())


@pytest.mark.parametrize("name", MODULES)
def test_runlocal_is_the_same_architecture(name: str) -> None:
    small = config_of(name, "runlocal")
    sizes = [config_of(name, size) for size in MODULES[name].SIZES]
    assert small.model.d_model <= 64
    assert any(architecture(small) == architecture(config) for config in sizes)


def architecture(config: Config) -> dict[str, object]:
    model, moe = config.model, config.moe
    routed = {
        "router": moe.router,
        "fill_order": moe.fill_order,
        "shared": moe.num_shared_experts,
        "pyramid": bool(moe.experts_per_layer),
    }
    return {
        "kinds": set(model.pattern),
        "grouped": model.kv_heads < model.num_heads,
        **{name: getattr(model, name) for name in ("family", "norm", "biases", "positions", "activation")},
        **{name: getattr(model, name) for name in ("experts_activation", "tie_embeddings", "scale_scores")},
        **(routed if model.has_experts else {}),
    }


def test_the_quickstart_models_meet_a_token_with_the_same_parameters_but_for_the_router() -> None:
    switch, dense = (config_of("quickstart", arg) for arg in ("switch", "dense"))
    routers = (switch.model.num_encoder_layers + switch.model.num_decoder_layers) // 2
    routers *= switch.model.d_model * switch.moe.num_experts
    assert account(switch).active == account(dense).total + routers
    assert account(dense).active == account(dense).total


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_runlocal_trains_two_steps_on_real_data(name: str, tmp_path: Path) -> None:
    config = config_of(name, "runlocal")
    summary = train(config, tmp_path)
    assert summary["steps"] == 2
    assert summary["corpora"] == (["fashion_mnist"] if config.model.family == "vision" else ["kjv"])
    assert set(losses(tmp_path)) == {1, 2}
