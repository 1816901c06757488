"""Tests mirror the package: `switchjax/ROOM/NAME.py` is tested by `tests/ROOM/test_NAME.py`."""

from pathlib import Path

import pytest

import switchjax

PACKAGE, TESTS = Path(switchjax.__file__).parent, Path(__file__).parent
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"
}
ELSEWHERE = {
    # A prompt's best continuation is one question, whatever the method.
    "inference/beam": "inference/test_decoding.py",
    # A source is seen in the texts that it gives.
    "data/builders": "data/test_datasets.py",
    "data/data": "data/test_text.py",
    "data/markup": "data/test_sources.py",
    "data/objective": "data/test_packing.py",
    "data/describe": "data/test_prepare_data.py",
    "data/sources/books": "data/test_sources.py",
    "data/sources/dictionary": "data/test_sources.py",
    "data/sources/images": "data/test_images.py",
    "data/sources/reference": "data/test_sources.py",
    "data/sources/restructured_text": "data/test_sources.py",
    "data/sources/source": "data/test_sources.py",
    # Whatever a format changes is read in one test.
    "config/formats": "training/test_formats.py",
    "training/checkpoint_arrays": "training/test_formats.py",
    "training/checkpoint_names": "training/test_formats.py",
    # One table, which the layers of every family are built from.
    "config/layers": "models/test_families.py",
    # The layers of a model are seen in its logits.
    "models/blocks": "models/test_families.py",
    "models/inputs": "models/test_families.py",
    "models/language_model": "models/test_families.py",
    "models/model": "models/test_families.py",
    "models/stack": "models/test_encoder_decoder.py",
    "moe/expert_parallel": "moe/test_layer_on_meshes.py",
    # Every router goes through the contract.
    "moe/routing": "moe/routers/test_every_router.py",
    # A family of Hugging Face's is one table, read by the same tests as the others.
    "interop/family": "interop/test_families.py",
    "interop/mixtral": "interop/test_families.py",
    "interop/switch": "interop/test_families.py",
    "interop/t5": "interop/test_families.py",
    "interop/vit": "interop/test_families.py",
    # Everything that is read from a compiled program has the same hand-written programs.
    "planning/hlo_collectives": "planning/test_hlo.py",
    "planning/hlo_cost": "planning/test_hlo.py",
    "planning/hlo_memory": "planning/test_hlo.py",
    "planning/report": "planning/test_plan.py",
    "planning/topology": "planning/test_plan.py",
    # Runs that a study starts and kills.
    "studies/train_to_end": "studies/test_family_study.py",
    "studies/disturbed_run": "studies/test_fault_study.py",
}
"""Module -> the file that tests it, where that is not the file of its name."""


def file_of_its_name(module: str) -> Path:
    room, _, name = module.rpartition("/")
    return TESTS / room / f"test_{name}.py"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_has_its_tests(module: str) -> None:
    own = file_of_its_name(module)
    assert own.is_file() or module in ELSEWHERE, f"{own} is missing"
    assert not own.is_file() or module not in ELSEWHERE, f"{module} needs no exception: {own} is there"


def test_the_exceptions_are_of_modules_and_tests_that_exist() -> None:
    assert set(ELSEWHERE) <= MODULES
    assert [file for file in ELSEWHERE.values() if not (TESTS / file).is_file()] == []
