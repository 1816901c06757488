"""From a Hugging Face folder to a workdir and back: the same bytes on any mesh; errors name what does not fit."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, UserError, load_workdir_config
from switchjax.interop.convert import (
    config_of,
    from_huggingface,
    huggingface_tensors,
    load_huggingface,
    to_huggingface,
)
from switchjax.interop.tensors import TensorFolder, write_tensors
from switchjax.models.families import build
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.training.evaluation import evaluate_workdir, load_model
from tests.interop.examples import (
    FIXTURES,
    MODELS,
    SHAPES,
    assert_same_bytes,
    one_device,
    random_folder,
    random_workdir,
)
from tests.parameters import random_parameters
from tests.tiny import changed
from tests.training.full_disk import full_disk


def read(folder: Path) -> dict[str, np.ndarray]:
    tensors = TensorFolder(folder)
    return {name: tensors.read(name) for name in tensors.names}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_weights_come_back_as_the_same_bytes(name: str, tmp_path: Path) -> None:
    tensors = random_folder(name, tmp_path)
    config = config_of(tmp_path)
    assert config.model.param_dtype == SHAPES[name]["dtype"]
    model = load_huggingface(tmp_path, config, one_device())
    assert_same_bytes(dict(huggingface_tensors(model, config)), tensors)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saved_comes_back_as_the_same_bytes(name: str) -> None:
    config = config_of(FIXTURES / name)
    model = load_huggingface(FIXTURES / name, config, one_device())
    assert_same_bytes(dict(huggingface_tensors(model, config)), load_file(FIXTURES / name / "model.safetensors"))


def test_through_a_workdir_on_a_mesh_and_files_in_parts(tmp_path: Path) -> None:
    tensors = random_folder("switch_step_2", tmp_path / "one")
    parts = tmp_path / "parts"
    parts.mkdir()
    write_tensors(parts, tensors.items(), 1500)
    (parts / "config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    config = dataclasses.replace(config_of(parts), mesh=MeshConfig(2, 4, 1))
    workdir, back = tmp_path / "workdir", tmp_path / "back"
    assert from_huggingface(parts, workdir, config) == sum(tensor.size for tensor in tensors.values())
    assert load_workdir_config(workdir) == config
    assert to_huggingface(workdir, back, max_file_bytes=2500) == 0
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_same_bytes(read(back), tensors)
    assert config_of(back) == dataclasses.replace(config, mesh=MeshConfig())


def test_each_device_is_given_its_own_part(tmp_path: Path) -> None:
    random_folder("mixtral_tied", tmp_path)
    config = config_of(tmp_path)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    whole = named_leaves(load_huggingface(tmp_path, config, one_device()))
    divided = named_leaves(load_huggingface(tmp_path, config, mesh))
    experts = divided["decoder/scans/0/blocks/0/ff/experts/w_in"]
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 2, 16, 12)}
    for name, leaf in divided.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole[name]), err_msg=name)


def test_the_host_holds_a_parameter_or_two_and_not_the_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 64, "d_ff": 8192, "num_heads": 2, "d_head": 8, "activation": "geglu"}
    layers = {"num_encoder_layers": 4, "num_decoder_layers": 4, "pattern": ("dense",)}
    config = Config(ModelConfig(**sizes, **layers), data=DataConfig(vocabulary_size=64, num_sentinels=0))
    write_tensors(
        tmp_path, huggingface_tensors(random_parameters(lambda: build(config, jax.random.key(0))), config), 10**9
    )
    tracemalloc.start()
    model = load_huggingface(tmp_path, config, one_device())
    kept, peak = tracemalloc.get_traced_memory()  # on the CPU a parameter may lie in the host's own array
    tracemalloc.stop()
    nbytes = [leaf.nbytes for leaf in jax.tree.leaves(model)]
    # Two while one is handed over, a tensor of one of four layers, and a megabyte of names and shapes.
    assert peak - kept < 2.5 * max(nbytes) + 2_000_000 < sum(nbytes) / 2


def edited(tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> Path:
    tensors = random_folder("t5_gated_silu", tmp_path)
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


_WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(_WO), rf"missing: {_WO}"),
        (lambda t: t.update({"surprise": t[_WO]}), r"unknown: surprise"),
        (lambda t: t.update({_WO: t[_WO].T.copy()}), rf"of another shape: {_WO} \(24, 16\) for \(16, 24\)"),
        (lambda t: t.update({"lm_head.weight": t["shared.weight"] + 1}), r"not the copies .*: lm_head.weight"),
        (lambda t: t.update({_WO: t[_WO].astype(np.float16)}), rf"{_WO} is F16; only F32 and BF16 are read"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    folder = edited(tmp_path, edit)
    with pytest.raises(UserError, match=message):
        load_huggingface(folder, config_of(folder), one_device())


def test_copies_and_tensors_that_no_model_reads_are_let_through(tmp_path: Path) -> None:
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    names = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    folder = edited(
        tmp_path,
        lambda t: t.update(dict.fromkeys(names, t["shared.weight"]) | {unused: np.ones((8, 3), np.float32)}),
    )
    load_huggingface(folder, config_of(folder), one_device())


def test_types_mixed_in_a_file_become_the_wider(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda t: t.update({_WO: t[_WO].astype(ml_dtypes.bfloat16)}))
    assert config_of(folder).model.param_dtype == "float32"


def test_what_else_a_config_says_survives(tmp_path: Path) -> None:
    random_folder("vit_deep", tmp_path / "source")
    path = tmp_path / "source/config.json"
    names = {"0": "cat", "1": "dog", "2": "emu", "3": "fox", "4": "gnu"}
    changes = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}, "surprise": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    config = dataclasses.replace(config_of(tmp_path / "source"), mesh=MeshConfig(data=8))
    from_huggingface(tmp_path / "source", tmp_path / "workdir", config)
    to_huggingface(tmp_path / "workdir", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(path.read_text())


def test_labels_that_a_config_leaves_open_are_written(tmp_path: Path) -> None:
    random_folder("vit_deep", tmp_path / "source")
    path = tmp_path / "source/config.json"
    num_labels = len(json.loads(path.read_text())["id2label"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": None, "num_labels": num_labels}))
    config = dataclasses.replace(config_of(tmp_path / "source"), mesh=MeshConfig(data=8))
    from_huggingface(tmp_path / "source", tmp_path / "workdir", config)
    to_huggingface(tmp_path / "workdir", tmp_path / "back")
    assert len(json.loads((tmp_path / "back/config.json").read_text())["id2label"]) == num_labels


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    random_folder("vit_deep", tmp_path / "source")
    config = config_of(tmp_path / "source")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/file").touch()
    with pytest.raises(UserError, match=r"target already exists"):
        from_huggingface(tmp_path / "source", tmp_path / "target", config)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]


def convert_on_full_disk(*arguments: str | Path) -> str:
    """The message of convert.py if the disk takes no file of more than 4000 bytes."""
    code = "import runpy, sys; from tests.training.full_disk import full_disk\n"
    code += "with full_disk(4000): runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {code}", "scripts/convert.py", *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # which would be damaged
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_on_a_full_disk_nothing_is_left_in_the_way(tmp_path: Path) -> None:
    source, workdir, back = (tmp_path / name for name in ("source", "workdir", "back"))
    random_folder("vit_deep", source)
    config = dataclasses.replace(config_of(source), mesh=MeshConfig(data=8, emulated_devices=8))
    said = convert_on_full_disk("from-hf", source, workdir)
    assert said.startswith(f"error: cannot write a checkpoint to {workdir}/checkpoints: File too large")
    assert len(said.splitlines()) == 1
    assert not workdir.exists()
    from_huggingface(source, workdir, config)
    said = convert_on_full_disk("to-hf", workdir, back)
    assert said.startswith(f"error: cannot write to {back}: ")
    assert "File too large" in said
    assert len(said.splitlines()) == 1
    assert not back.exists()
    with full_disk(4000), pytest.raises(UserError, match=r"cannot write to .*back: .*File too large"):
        to_huggingface(workdir, back, max_file_bytes=3000)  # after files that there was room for
    assert not back.exists()
    with pytest.raises(UserError, match=r"cannot write to .*config.json/back: .*Not a directory"):
        to_huggingface(workdir, workdir / "config.json/back")
    to_huggingface(workdir, back)


@pytest.fixture(scope="module")
def trained(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run's workdir with room for all tokens, because transformers counts capacity differently."""
    config = changed(tiny, moe={"eval_capacity_factor": 4.0})
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    random_workdir(config, workdir)
    return workdir, config


@pytest.fixture(scope="module")
def imported(trained: tuple[Path, Config], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """The same run after conversion to Hugging Face and back."""
    workdir, config = trained
    folder = tmp_path_factory.mktemp("hub")
    to_huggingface(workdir, folder)
    found = config_of(folder)
    assert (found.data.vocabulary_size, found.data.num_sentinels) == (330, 16)
    found = dataclasses.replace(found, mesh=config.mesh, data=config.data, evaluate=config.evaluate)
    back = tmp_path_factory.mktemp("back")
    from_huggingface(folder, back, found)
    return back, found


def test_evaluation_reads_an_imported_model_as_one_that_was_trained(
    trained: tuple[Path, Config], imported: tuple[Path, Config]
) -> None:
    (_, before), (_, after) = (
        evaluate_workdir(config, workdir, one_device()) for workdir, config in (trained, imported)
    )
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_decoding_reads_an_imported_model(imported: tuple[Path, Config]) -> None:
    workdir, config = imported
    short = changed(config, data={"decoder_length": 3}, mesh={"data": -1, "expert": 1})
    (workdir / "config.json").write_text(short.to_json())
    command = [sys.executable, "scripts/generate.py", f"--workdir={workdir}", "--prompt=the keeper <extra_id_0> ships"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    (workdir / "config.json").write_text(config.to_json())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the keeper [")


def test_a_router_keeps_what_bfloat16_would_lose(trained: tuple[Path, Config]) -> None:
    workdir, config = trained
    config = changed(config, model={"param_dtype": "bfloat16"})
    _, model = load_model(config, workdir, one_device())
    dtypes = {str(tensor.dtype) for name, tensor in huggingface_tensors(model, config) if "router" in name}
    assert dtypes == {"float32"}
    others = {str(tensor.dtype) for name, tensor in huggingface_tensors(model, config) if "router" not in name}
    assert others == {"bfloat16"}
