"""Models as decoding and scoring take them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from switchjax.config import Config, MeshConfig, UserError
from switchjax.data.text import TextData
from switchjax.inference.pretrained import dropless, load_pretrained
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


def test_a_run_is_loaded_over_another_mesh_and_drops_no_token(tiny: Config, tmp_path: Path) -> None:
    state = plan_state(tiny, make_mesh(tiny.mesh)).create()
    data = TextData.prepare(tiny.data)
    record_run(tmp_path, tiny, data.vocabulary)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {"fingerprint": data.fingerprint}, tiny)
    checkpoints.close()
    with pytest.raises(UserError, match=r"model.num_heads=2 does not divide over mesh.model=4"):
        load_pretrained(tmp_path, make_mesh(MeshConfig(1, 2, 4)))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        pretrained = load_pretrained(tmp_path, mesh)
    assert pretrained.config == dropless(tiny) == changed(tiny, moe={"dropless": True, "group_size": 1})
    assert pretrained.vocabulary.encode("the lamp") == data.vocabulary.encode("the lamp")
    expected = named_leaves(state.model)
    for name, leaf in named_leaves(pretrained.model).items():
        assert leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(leaf, expected[name])
