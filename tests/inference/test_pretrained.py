"""Models as decoding and scoring take them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, MeshConfig, UserError
from switchjax.data.text import TextData
from switchjax.data.vocabulary import Vocabulary
from switchjax.inference.pretrained import dropless, load_pretrained
from switchjax.models.model import Model
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.state import plan_state
from switchjax.training.workdir import record_run
from tests.models import examples
from tests.models.families import FAMILIES
from tests.tiny import changed


def test_a_router_that_looks_at_several_tokens_is_refused() -> None:
    config = examples.changed(router="expert_choice", allow_noncausal_routing=True)
    with pytest.raises(UserError, match=r"moe.router=expert_choice cannot route token by token"):
        dropless(config)
    with pytest.raises(UserError, match=r"model.family=vision"):
        dropless(FAMILIES["v_moe"])
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=("dense",)))
    assert dropless(dense) == dense
    assert dropless(FAMILIES["peer"]) == FAMILIES["peer"]  # it has no slots


@pytest.fixture(scope="module")
def run(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, Vocabulary]:
    """A workdir, and the model and vocabulary in it."""
    workdir, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    shapes = plan_state(tiny, make_mesh(tiny.mesh)).shapes
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    data = TextData.prepare(tiny.data)
    record_run(workdir, tiny, data.vocabulary)
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(state, {"fingerprint": data.fingerprint}, tiny)
    checkpoints.close()
    return workdir, state.model, data.vocabulary


def test_a_run_is_loaded_over_another_mesh_and_drops_no_token(
    tiny: Config, run: tuple[Path, Model, Vocabulary]
) -> None:
    workdir, model, vocabulary = run
    with pytest.raises(UserError, match=r"model.num_heads=2 does not divide over mesh.model=4"):
        load_pretrained(workdir, make_mesh(MeshConfig(1, 2, 4)))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        pretrained = load_pretrained(workdir, mesh)
    assert pretrained.config == dropless(tiny) == changed(tiny, moe={"dropless": True, "group_size": 1})
    assert pretrained.vocabulary.encode("the lamp") == vocabulary.encode("the lamp")
    expected = named_leaves(model)
    for name, leaf in named_leaves(pretrained.model).items():
        assert leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(leaf, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--method=beam", "--num_beams=2", "--mesh", "2", "2", "2"]], ids=str)
def test_the_script_fills_in_passages(run: tuple[Path, Model, Vocabulary], flags: list[str]) -> None:
    prompts = ["the <extra_id_0> counted", "a <extra_id_0> and a <extra_id_1>"]
    arguments = [f"--workdir={run[0]}", "--max_new_tokens=4", *(f"--prompt={prompt}" for prompt in prompts), *flags]
    root = Path(__file__).parents[2]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "scripts/generate.py", *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("the [")
    assert first.endswith("] counted")
    assert second.count("[") == 2
