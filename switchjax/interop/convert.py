"""A folder of Hugging Face's as a workdir that evaluation and decoding read as one that was trained, and back."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import DTypeLike, Int, Shaped

from switchjax.config import Config, load_workdir_config
from switchjax.interop.config import read_config, read_json, write_config
from switchjax.interop.families import FAMILIES, model_type_of
from switchjax.interop.family import Values
from switchjax.interop.folders import check_new, new_folder
from switchjax.interop.mapping import check_tensors, load, match
from switchjax.interop.tensors import TensorFolder, write_tensors
from switchjax.interop.tokenizer import (
    FOLDER,
    export_tokenizer,
    keep_files,
    own_vocabulary,
    read_vocabulary,
    renumbering,
    special_tokens,
)
from switchjax.interop.workdirs import write_workdir
from switchjax.models.model import Model
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.parallel.sharding import named_leaves, with_leaves
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.state import plan_state

MAX_FILE_BYTES = 5_000_000_000
"""Size above which weights are written as several files."""


def config_of(folder: Path) -> Config:
    """The config of a model in a folder of Hugging Face's.

    Raises:
        UserError: naming what cannot be read, is not supported, or is not known.
    """
    return read_config(folder, TensorFolder(folder))


def load_huggingface(folder: Path, config: Config, mesh: Mesh, ids: Int[np.ndarray, "V"] | None = None) -> Model:
    """The model in a folder of Hugging Face's, laid over a mesh, read parameter by parameter.

    The host holds one parameter, or two while one is handed over, where those of a run of layers are one; a device is
    only given its own part.

    Args:
        folder: with safetensors.
        config: of the model.
        mesh: of devices.
        ids: their id of each of ours (`renumbering`); None: the same.

    Raises:
        UserError: naming tensors that are missing, in excess, or of other shapes than the config asks for.
    """
    source, plan = TensorFolder(folder), plan_state(config, mesh)
    shapes, shardings = named_leaves(plan.shapes.model), named_leaves(plan.shardings.model)
    table = FAMILIES[model_type_of(config)].table(config.model)
    entries = match(config, table, shapes, ids)
    check_tensors(entries, table, source)
    leaves = {name: load(entry, source, shapes[name].dtype, shardings[name]) for name, entry in entries.items()}
    return with_leaves(plan.shapes.model, leaves)


def from_huggingface(folder: Path, workdir: Path, config: Config) -> int:
    """Writes a model of Hugging Face's as the only checkpoint of a new workdir (`write_workdir`).

    Args:
        folder: with config.json, safetensors and, where there is one, a tokenizer.
        workdir: that does not exist yet or is empty.
        config: that of the folder, perhaps with another mesh, type or data.

    Returns:
        The number of parameters.

    Raises:
        UserError: naming what does not fit, or if it cannot be written.
    """
    check_new(workdir)
    mesh, vocabulary = make_mesh(config.mesh), read_vocabulary(folder)
    check_fit(config, mesh)
    with jax.set_mesh(mesh):
        model = load_huggingface(folder, config, mesh, renumbering(vocabulary, config.model.vocab_size))
        with new_folder(workdir):
            write_workdir(workdir, model, config, vocabulary)
            keep_files(folder, workdir)
    return sum(leaf.size for leaf in named_leaves(model).values())


def to_huggingface(workdir: Path, folder: Path, step: int = -1, max_file_bytes: int = MAX_FILE_BYTES) -> int:
    """Writes a workdir's checkpoint as transformers' `save_pretrained` would, with the tokenizer if there is one.

    Tensors have the type `model.param_dtype`; a router's, float32 here whatever that is, keeps float32 unless it loses
    nothing.

    Args:
        workdir: of a run, or imported.
        folder: that does not exist yet or is empty.
        step: of the checkpoint; -1: the latest.
        max_file_bytes: size above which there are several files.

    Returns:
        The step.

    Raises:
        UserError: naming what transformers' model cannot do or has no place for, or if it cannot be written.
    """
    config = load_workdir_config(workdir)
    mesh, vocabulary = make_mesh(config.mesh), own_vocabulary(workdir, config)
    description = _with_kept(workdir, write_config(config) | special_tokens(vocabulary, config))
    check_new(folder)
    with jax.set_mesh(mesh), closing(Checkpoints(workdir)) as checkpoints:
        step, model = checkpoints.load_model(plan_state(config, mesh), step)
        tensors = huggingface_tensors(model, config, renumbering(vocabulary, config.model.vocab_size))
        with new_folder(folder):
            write_tensors(folder, tensors, max_file_bytes)
            (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
            export_tokenizer(workdir, folder, vocabulary)
    return step


def _with_kept(workdir: Path, description: Values) -> Values:
    """With what else config.json said of a model that was imported, such as the names of its classes."""
    path = workdir / FOLDER / "config.json"
    if not path.exists():
        return description
    kept = {key: value for key, value in read_json(path).items() if key != "torch_dtype"}  # dtype says it now
    named = len(kept.get("id2label") or ()) == len(description.get("id2label", ()))
    labels = ("id2label", "label2id") if named else ()
    return kept | {key: value for key, value in description.items() if key not in labels}


def huggingface_tensors(
    model: Model, config: Config, ids: Int[np.ndarray, "V"] | None = None
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Name and content of all tensors of Hugging Face's, parameter by parameter.

    Args:
        model: any of those families.
        config: its config.
        ids: their id of each of ours (`renumbering`); None: the same.

    Raises:
        UserError: naming the parameters that transformers' model has no place for.
    """
    leaves, dtype = named_leaves(model), jnp.dtype(config.model.param_dtype)
    table = FAMILIES[model_type_of(config)].table(config.model)
    entries = match(config, table, leaves, ids)
    copies: dict[str, list[str]] = {}
    for copy in table.written:
        copies.setdefault(table.copies[copy], []).append(copy)
    return (
        (name, _narrow(tensor, dtype))
        for key, entry in entries.items()
        for original, tensor in entry.split(leaves[key])
        for name in (original, *copies.get(original, ()))
    )


def _narrow(tensor: Shaped[np.ndarray, "..."], dtype: DTypeLike) -> Shaped[np.ndarray, "..."]:
    """In `dtype`, if that changes no value."""
    narrow = tensor.astype(dtype)
    return narrow if np.array_equal(narrow.astype(tensor.dtype), tensor) else tensor
