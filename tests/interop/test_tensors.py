"""Folders of safetensors: one file or several, and folders that are refused."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from switchjax.config import UserError
from switchjax.interop.tensors import TensorFolder, write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.ones((2, 2), np.float32).T,
}


@pytest.mark.parametrize(("max_bytes", "files"), [(1000, 1), (23, 3), (24, 2), (32, 2), (1, 3)])
def test_what_is_written_is_read_back(tmp_path: Path, max_bytes: int, files: int) -> None:
    write_tensors(tmp_path, TENSORS.items(), max_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    folder = TensorFolder(tmp_path)
    assert folder.names == set(TENSORS)
    assert {name: folder.dtype(name) for name in "abc"} == {"a": "F32", "b": "BF16", "c": "F32"}
    for name, tensor in TENSORS.items():
        assert folder.shape(name) == tensor.shape
        np.testing.assert_array_equal(folder.read(name), tensor)


def test_the_index_names_each_tensors_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS.items(), 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("abc", 1)}
    assert index["metadata"]["total_size"] == 24 + 8 + 16


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"neither model.safetensors .*; pytorch_model.bin is a pickle"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "folder/model.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"names files outside its folder"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"is not an index of safetensors files"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", bytes(100)])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        TensorFolder(tmp_path)
