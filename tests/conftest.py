"""What every test runs under: 8 CPU devices, shapes checked at run time, and nothing promoted silently."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

from tests import type_checks

pytest_plugins = ("tests.stories", "tests.tiny")

# Before anything imports the package or starts JAX. The room config checks what it is given itself, and has no arrays.
ROOMS = (path.parent.name for path in Path(__file__).parents[1].glob("switchjax/*/__init__.py"))
install_import_hook([f"switchjax.{room}" for room in ROOMS if room != "config"], f"{type_checks.__name__}.check")
# The scripts that tests start read the variable: libtpu complains where no TPU is.
if not os.environ.get("JAX_PLATFORMS", "").endswith(",cpu"):  # as tests/test_accelerators.py wants it
    os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
# As `emulate_devices` has it: programs in flight at once can wait for each other's threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Compiling takes longer than running what is compiled.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Workers and runs share what they compile, in pytest's cache folder."""
    folder = str(config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # So do the scripts and runs that tests start.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Each program that a process has compiled takes some of the memory maps that the system allows it; out of them,
    XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized_programs() -> Iterator[None]:
    """XLA compiles with all its optimisations, as it does outside of the tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


# The first example of each shape compiles, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("switchjax", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("switchjax")
