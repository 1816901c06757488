"""Rooms import upwards only, and importing them is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import switchjax

PACKAGE = Path(switchjax.__file__).parent
ROOMS = (
    "config",
    "parallel",
    "moe",
    "models",
    "accounting",
    "data",
    "training",
    "inference",
    "planning",
    "interop",
    "studies",
)
"""In this order: a room imports itself and those before it."""
ALLOWED = {room: set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)} | {
    "process_settings": {"config"},
    "command": {"config", "process_settings"},
    "__init__": set(),
}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from switchjax import moe` imports a module, `from switchjax.moe import x` a name of it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_itself_and_those_before_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    imported = {name.split(".")[1] for name in imported_modules(path) if name.startswith("switchjax.")}
    assert imported <= ALLOWED[room], f"{room} imports {sorted(imported - ALLOWED[room])}"


@pytest.mark.parametrize(
    "name",
    [
        "capacity",
        "gather_sum",
        "dispatch",
        "losses",
        "routing",
        "ragged",
        *(f"routers/{path.stem}" for path in (PACKAGE / "moe" / "routers").glob("[a-z]*.py")),
    ],
)
def test_routing_and_dispatch_are_functions_of_arrays_without_flax(name: str) -> None:
    assert not [module for module in imported_modules(PACKAGE / "moe" / f"{name}.py") if module.startswith("flax")]


def test_one_module_imports_private_jax() -> None:
    private = {path.name for path in modules() for name in imported_modules(path) if name.startswith("jax._src")}
    assert private == {"private_jax.py"}


def test_no_module_imports_tensorflow() -> None:
    offenders = [path for path in modules() for name in imported_modules(path) if name.split(".")[0] == "tensorflow"]
    assert not offenders


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("switchjax", {"jax", "numpy"}),
        ("switchjax.config", {"jax", "flax", "tensorflow"}),
        ("switchjax.parallel.mesh", {"flax", "tensorflow"}),
        ("switchjax.moe.routing", {"flax", "tensorflow"}),
        ("switchjax.models.encoder_decoder", {"tensorflow", "tensorflow_datasets", "grain"}),
    ],
)
def test_importing_a_module_loads_nothing_heavier_than_it_needs(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*({forbidden!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == []


def test_importing_the_models_does_not_start_jax() -> None:
    """A script can still choose emulated devices after its imports."""
    code = (
        "import switchjax.models.encoder_decoder, jax;"
        "jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 3);"
        "print(jax.device_count())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == ["3"]
