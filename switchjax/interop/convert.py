"""Converts a Hugging Face folder into a workdir for evaluation, decoding and training, and back."""

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
from switchjax.interop.families import HUGGINGFACE_FAMILIES, model_type_of
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
"""Default size above which weights are written to several files."""


def config_of(folder: Path) -> Config:
    """The config of the model in a Hugging Face folder, by `read_config`."""
    return read_config(folder, TensorFolder(folder))


def load_huggingface(folder: Path, config: Config, mesh: Mesh, ids: Int[np.ndarray, "V"] | None = None) -> Model:
    """Loads a Hugging Face folder parameter by parameter and lays the model over a mesh.

    The host holds at most two parameters at a time (stacked layers share one parameter), and each device receives only
    its own part.

    `ids` are Hugging Face's ids for each of ours (`renumbering`); None if equal.

    Raises:
        UserError: names tensors that are missing, surplus or of another shape than the config requires.
    """
    source, plan = TensorFolder(folder), plan_state(config, mesh)
    shapes, shardings = named_leaves(plan.shapes.model), named_leaves(plan.shardings.model)
    table = HUGGINGFACE_FAMILIES[model_type_of(config)].table(config.model)
    entries = match(config, table, shapes, ids)
    check_tensors(entries, table, source)
    leaves = {name: load(entry, source, shapes[name].dtype, shardings[name]) for name, entry in entries.items()}
    return with_leaves(plan.shapes.model, leaves)


def from_huggingface(folder: Path, workdir: Path, config: Config) -> int:
    """Writes a Hugging Face model as the only checkpoint of a new workdir; returns the number of parameters.

    `config` is that of the folder, perhaps with another mesh, dtype or data.

    Raises:
        UserError: names what does not fit or cannot be written.
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
    """Writes a workdir's checkpoint in the format of `save_pretrained`, with the tokenizer if any; returns the step.

    Step -1 is the latest. Tensors have the type `model.param_dtype`. A router, always float32 here, is narrowed to it
    only if no value changes. Weights larger than `max_file_bytes` are written to several files.

    Raises:
        UserError: names what transformers' model does not support or what cannot be written.
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
    """Adds what else an imported model's config.json holds, such as the names of classes."""
    path = workdir / FOLDER / "config.json"
    if not path.exists():
        return description
    kept = {key: value for key, value in read_json(path).items() if key != "torch_dtype"}  # the old name of dtype
    named = len(kept.get("id2label") or ()) == len(description.get("id2label", ()))
    labels = ("id2label", "label2id") if named else ()
    return kept | {key: value for key, value in description.items() if key not in labels}


def huggingface_tensors(
    model: Model, config: Config, ids: Int[np.ndarray, "V"] | None = None
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Names and contents of all Hugging Face tensors, parameter by parameter.

    `ids` are Hugging Face's ids for each of ours (`renumbering`); None if equal.

    Raises:
        UserError: names the parameters that transformers' model lacks.
    """
    leaves, dtype = named_leaves(model), jnp.dtype(config.model.param_dtype)
    table = HUGGINGFACE_FAMILIES[model_type_of(config)].table(config.model)
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
    """Converts a tensor to `dtype` if no value changes."""
    narrow = tensor.astype(dtype)
    return narrow if np.array_equal(narrow.astype(tensor.dtype), tensor) else tensor
