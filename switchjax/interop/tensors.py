"""Reads folders of safetensors files tensor by tensor, and writes them file by file."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from switchjax.config import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
"""Supported types: safetensors' name -> ours."""


class TensorFolder:
    """The tensors of `model.safetensors`, or of the files that its index names. Pickles are never read.

    Raises:
        UserError: if the files are missing or unreadable.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        if (folder / _INDEX).is_file():
            files = sorted(set(_weight_map(folder / _INDEX).values()))
        elif (folder / _SINGLE).is_file():
            files = [_SINGLE]
        else:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle: save the model as safetensors instead" if pickles else ""
            raise UserError(f"{folder} holds neither {_SINGLE} nor {_INDEX}{hint}")
        self._files = {file: _open(folder / file) for file in files}

    @cached_property
    def _owner(self) -> dict[str, Any]:
        return {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._owner[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as safetensors names it: F32, BF16, ..."""
        return self._owner[name].get_slice(name).get_dtype()

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Reads a whole tensor."""
        return self._owner[name].get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        inside = all(Path(file).name == file for file in files.values())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not an index of safetensors files") from None
    if not inside:
        raise UserError(f"{path} names files outside its folder")
    return files


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Shaped[np.ndarray, "..."]]], max_bytes: int) -> None:
    """Writes tensors in order, into files of at most `max_bytes` (or one tensor); several files get an index.

    The files have the names that transformers' `save_pretrained` gives them.
    """
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / _part(len(files)), metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(array.nbytes for array in held.values()) + tensor.nbytes > max_bytes:
            flush()
        held[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / _part(0)).rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _part(i)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _part(number: int) -> str:
    return f"unfinished-{number:05d}.safetensors"
