"""Tables of hash layers from token counts and from embeddings: every layer gets one and training keeps it."""

import collections
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from switchjax.config import Config, UserError
from switchjax.data.text import TextData
from switchjax.models.families import build
from switchjax.moe.routers.hash import balanced_table, clustered_table
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.hash_tables import count_tokens, with_hash_tables
from switchjax.training.metrics import read_metrics
from switchjax.training.run import train
from switchjax.training.state import plan_state
from tests.tiny import changed

pytestmark = pytest.mark.slow

TABLES = [f"{stack}/scans/0/blocks/1/ff/router/table" for stack in ("encoder", "decoder")]
SEGMENTS = ("encoder_segments", "decoder_segments")


@pytest.fixture(scope="module")
def data(tiny: Config) -> TextData:
    return TextData.prepare(tiny.data)


@pytest.fixture(scope="module")
def balanced(tiny: Config) -> Config:
    return changed(
        tiny, moe={"router": "hash", "options": {"hash_table": "balanced"}}, train={"steps": 2, "checkpoint_every": 1}
    )


@pytest.fixture(scope="module")
def workdir(balanced: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of two steps with balanced tables."""
    workdir = tmp_path_factory.mktemp("balanced")
    train(balanced, workdir)
    return workdir


def weights_of(config: Config, workdir: Path, step: int) -> dict[str, np.ndarray]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _, model = Checkpoints(workdir).load_model(plan_state(config, mesh), step)
    return jax.device_get(named_leaves(model))


def test_ids_are_counted_where_routers_see_them(data: TextData) -> None:
    batches = list(itertools.islice(data.train_batches(), 3))
    counts = count_tokens(iter(batches), 352, at_least=1 + int(sum(np.sum(batches[0][n] > 0) for n in SEGMENTS)))
    expected: collections.Counter[int] = collections.Counter()
    for batch in batches[:2]:
        for tokens, segments in zip(("encoder_tokens", "decoder_inputs"), SEGMENTS, strict=True):
            expected.update(t for t, s in zip(batch[tokens].flat, batch[segments].flat, strict=True) if s)
    np.testing.assert_array_equal(counts, [expected[token] for token in range(352)])


def test_a_run_keeps_the_balanced_table_in_every_layer(balanced: Config, workdir: Path, data: TextData) -> None:
    expected = balanced_table(count_tokens(data.train_batches(), 352), balanced.moe.num_experts)
    first, last = (weights_of(balanced, workdir, step) for step in (1, 2))
    for weights in (first, last):
        for name in TABLES:
            np.testing.assert_array_equal(weights[name], [expected], err_msg=name)
    assert np.any(first["embedding/vectors"] != last["embedding/vectors"])
    for record in read_metrics(workdir, "train"):
        assert record["load_balance_loss"] == pytest.approx(1, abs=0.2)


def test_in_a_pyramid_each_layer_has_a_table_for_its_own_experts(balanced: Config, data: TextData) -> None:
    config = changed(balanced, model={"pattern": ("moe",)}, moe={"experts_per_layer": (4, 8)})
    model = jax.jit(lambda: build(config, jax.random.key(0)))()
    leaves, counts = named_leaves(with_hash_tables(model, config, data)), count_tokens(data.train_batches(), 352)
    for stack, (run, experts) in itertools.product(("encoder", "decoder"), enumerate((4, 8))):
        table = leaves[f"{stack}/scans/{run}/blocks/0/ff/router/table"]
        np.testing.assert_array_equal(table, [balanced_table(counts, experts)])


def test_clusters_are_those_of_the_source_runs_embedding(balanced: Config, workdir: Path, tmp_path: Path) -> None:
    clustered = changed(
        balanced,
        moe={"options": {"hash_table": "clustered"}},
        init_from={"workdir": str(workdir)},
        train={"steps": 1, "seed": 5},
    )
    train(clustered, tmp_path)
    vectors = weights_of(balanced, workdir, 2)["embedding/vectors"]
    expected = clustered_table(np.asarray(vectors), 4, 5)
    trained = weights_of(clustered, tmp_path, 1)
    for name in TABLES:
        np.testing.assert_array_equal(trained[name], expected[None], err_msg=name)


def test_layers_taken_from_a_run_with_the_same_kind_of_table_keep_theirs(
    balanced: Config, workdir: Path, data: TextData
) -> None:
    config = changed(
        balanced, model={"pattern": ("moe",), "num_encoder_layers": 3}, init_from={"workdir": str(workdir)}
    )
    model = jax.jit(lambda: build(config, jax.random.key(0)))()
    name, taken = "encoder/scans/0/blocks/0/ff/router/table", {"encoder/1/ff/router/table"}
    before, after = (named_leaves(m)[name] for m in (model, with_hash_tables(model, config, data, taken)))
    expected = balanced_table(count_tokens(data.train_batches(), 352), 4)
    np.testing.assert_array_equal(after, [expected, before[1], expected])
    assert (
        with_hash_tables(
            model,
            config,
            data,
            {*taken, *(f"{s}/{i}/ff/router/table" for s in ("encoder", "decoder") for i in range(3))},
        )
        is model
    )


def test_clusters_need_a_run_to_take_embeddings_from(balanced: Config, tmp_path: Path) -> None:
    config = changed(balanced, moe={"options": {"hash_table": "clustered"}})
    with pytest.raises(UserError, match=r"set init_from\.workdir"):
        train(config, tmp_path)
