"""Upcycling and pruning a run: evaluation before and after."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from switchjax.config import Config, MeshConfig, UserError, load_workdir_config
from switchjax.data.data import Data
from switchjax.interop import workdirs
from switchjax.interop.workdirs import prune_workdir, upcycle_workdir
from switchjax.parallel.sharding import named_leaves
from switchjax.training.evaluation import evaluate_workdir, load_model
from tests.interop.examples import one_device, random_workdir
from tests.tiny import changed
from tests.training.full_disk import full_disk

TOP_2 = {"router": "top_k", "num_selected_experts": 2, "dropless": True}


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    """The config of two layers, dense and with experts, on a mesh."""
    return changed(tiny, moe=TOP_2, mesh={"data": 2, "expert": 4})


@pytest.fixture(scope="module")
def dense(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "dense"
    random_workdir(changed(config, model={"pattern": ("dense",)}), workdir)
    return workdir


@pytest.fixture(scope="module")
def upcycled(config: Config, dense: Path) -> Path:
    workdir = dense.with_name("upcycled")
    upcycle_workdir(dense, workdir, config)
    return workdir


def test_an_upcycled_run_is_as_good_as_the_dense_one(config: Config, dense: Path, upcycled: Path) -> None:
    assert load_workdir_config(upcycled) == config
    (_, before), (_, after) = (
        evaluate_workdir(load_workdir_config(workdir), workdir, one_device()) for workdir in (dense, upcycled)
    )
    assert after["fraction_tokens_dropped"] == 0
    # Gates sum to 1 but for rounding.
    assert after["neg_log_perplexity"] == pytest.approx(before["neg_log_perplexity"], rel=1e-5)


def test_a_pruned_run_has_fewer_experts(upcycled: Path) -> None:
    workdir = upcycled.with_name("pruned")
    config = dataclasses.replace(load_workdir_config(upcycled), mesh=MeshConfig(4, 2, 1))
    (upcycled / "config.json").write_text(config.to_json())
    prune_workdir(upcycled, workdir, 2)
    pruned = load_workdir_config(workdir)
    assert pruned == changed(config, moe={"num_experts": 2})
    _, model = load_model(pruned, workdir, one_device())
    assert named_leaves(model)["encoder/scans/0/blocks/1/ff/experts/w_in"].shape == (1, 2, 16, 32)


def test_pruning_needs_the_runs_own_vocabulary_and_held_out_data(
    upcycled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "run"
    shutil.copytree(upcycled, source)
    config = load_workdir_config(upcycled)
    (source / "config.json").write_text(
        changed(config, evaluate={"split": "test"}, mesh={"data": 4, "expert": 2}).to_json()
    )
    with monkeypatch.context() as patch:
        patch.setattr(Data, "evaluation_batches", lambda *_: iter(()))
        with pytest.raises(UserError, match=r"no corpus has anything in its test"):
            prune_workdir(source, tmp_path / "new", 2)
    (source / "vocabulary.model").unlink()  # as of an imported model whose tokenizer cannot be read here
    with pytest.raises(UserError, match=r"cannot read the vocabulary"):
        prune_workdir(source, tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()


def test_on_a_full_disk_nothing_is_left_in_the_way(
    config: Config, dense: Path, upcycled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record_on_full_disk(workdir: Path, *arguments: Any) -> None:
        with full_disk(100):
            (workdir / "config.json").write_text("{" * 200)

    monkeypatch.setattr(workdirs, "record_run", record_on_full_disk)
    with pytest.raises(UserError, match=r"cannot write to .*new: .*File too large"):
        upcycle_workdir(dense, tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"cannot write to .*new: .*File too large"):
        prune_workdir(upcycled, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(config: Config, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no layer with experts"):
        upcycle_workdir(dense, tmp_path / "new", changed(config, model={"pattern": ("dense",)}))
    with pytest.raises(UserError, match=r"dense already exists"):
        upcycle_workdir(dense, dense, config)
    with pytest.raises(UserError, match=r"the dense model has no logits"):
        upcycle_workdir(dense, tmp_path / "new", changed(config, model={"tie_embeddings": False}))
    assert not (tmp_path / "new").exists()
