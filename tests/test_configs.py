"""Every config file builds in every size, has the published size, and trains in its `runlocal` form on real data."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from switchjax.accounting.accounting import account
from switchjax.accounting.parameters import count_parameters
from switchjax.accounting.published import PUBLISHED, TOLERANCE, compare
from switchjax.config import Config, UserError
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
def test_every_size_has_as_many_parameters_as_the_formula_says(name: str) -> None:
    for size in (*MODULES[name].SIZES, "runlocal"):
        config = config_of(name, size)
        counted, accounting = count_parameters(config), account(config)
        assert counted.total == accounting.total, size
        assert counted.active == accounting.active, size


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_size_agrees_with_the_published_figures_or_the_note_says_why(name: str) -> None:
    for key, published in PUBLISHED.items():
        system, size = key.split(":")
        if system == name:
            comparisons = compare(key, config_of(system, size))
            assert [found for found in comparisons if not found.agrees] == []
            assert "total" in [found.figure for found in comparisons]
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
    assert count_parameters(switch).active == count_parameters(dense).total + routers
    assert count_parameters(dense).active == count_parameters(dense).total


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_runlocal_trains_two_steps_on_real_data(name: str, tmp_path: Path) -> None:
    config = config_of(name, "runlocal")
    summary = train(config, tmp_path)
    assert summary["steps"] == 2
    assert summary["corpora"] == (["fashion_mnist"] if config.model.family == "vision" else ["kjv"])
    assert set(losses(tmp_path)) == {1, 2}
