"""The models that transformers made (`make_fixtures.py`), loaded on one device; and folders of random tensors."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from switchjax.config import Config, MeshConfig
from switchjax.data.text import TextData
from switchjax.interop.convert import config_of, load_huggingface
from switchjax.interop.workdirs import write_workdir
from switchjax.models.families import build
from switchjax.models.model import Model
from switchjax.parallel.mesh import make_mesh
from tests.parameters import random_parameters

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
SHAPES: dict[str, Any] = json.loads((FIXTURES / "shapes.json").read_text())


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@cache
def load_fixture(name: str) -> tuple[Config, Model]:
    config = config_of(FIXTURES / name)
    return config, load_huggingface(FIXTURES / name, config, one_device())


def expected(name: str) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / name / "expected.safetensors")


def random_folder(name: str, folder: Path, deviation: float = 1.0) -> dict[str, np.ndarray]:
    """Writes config.json and random tensors under the names and shapes of one of `SHAPES`; returns the tensors."""
    rng, description = np.random.default_rng(0), SHAPES[name]
    dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[description["dtype"]]
    tensors = {key: (deviation * rng.normal(size=shape)).astype(dtype) for key, shape in description["tensors"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(description["config"]))
    return tensors


def random_workdir(config: Config, workdir: Path) -> None:
    """A run's workdir, with its vocabulary and a checkpoint of random parameters."""
    workdir.mkdir()
    vocabulary = TextData.prepare(config.data).vocabulary
    write_workdir(workdir, random_parameters(lambda: build(config, jax.random.key(0))), config, vocabulary)


def assert_same_bytes(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name
