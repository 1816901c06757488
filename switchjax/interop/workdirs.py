"""Writes workdirs with weights of another model: imported, upcycled or pruned."""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from switchjax.config import Config, UserError, load_workdir_config
from switchjax.data.data import Data
from switchjax.data.prepare import prepare_data
from switchjax.data.vocabulary import Vocabulary
from switchjax.interop.folders import check_new, new_folder
from switchjax.interop.tokenizer import own_vocabulary
from switchjax.interop.upcycle import expert_usage, prune, pruned_config, upcycle
from switchjax.models.model import Batch, Model
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.parallel.sharding import place_batch
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.evaluation import load_model
from switchjax.training.state import TrainState, plan_state
from switchjax.training.workdir import load_vocabulary, open_workdir, record_run, vocabulary_path


def write_workdir(workdir: Path, model: Model, config: Config, vocabulary: Vocabulary | None) -> None:
    """Writes a model as the only checkpoint of a new workdir, at step 0.

    The checkpoint has only parameters, for evaluation and decoding. Training starts from it in another workdir, with
    `init_from.workdir`.
    """
    open_workdir(workdir, config)
    record_run(workdir, config, vocabulary)
    with closing(Checkpoints(workdir, keep=1)) as checkpoints:
        state = TrainState(jnp.zeros((), jnp.int32), model, ())
        checkpoints.save(state, {"iterator": {}, "fingerprint": ""}, config)


def upcycle_workdir(source: Path, workdir: Path, config: Config, noise: float = 0.0) -> None:
    """Writes a new workdir with the model that `upcycle` makes of the latest checkpoint of the dense run in `source`.

    Raises:
        UserError: names what does not fit or cannot be written.
    """
    check_new(workdir)
    if not config.model.has_experts:
        raise UserError("model.pattern names no layer with experts")
    dense_config, mesh = load_workdir_config(source), make_mesh(config.mesh)
    check_fit(config, mesh)
    with jax.set_mesh(mesh):
        _, dense = load_model(dense_config, source, mesh)

        def start(dense: Model) -> Model:
            return upcycle(dense, dense_config, config, jax.random.key(config.train.seed), noise)

        model = jax.jit(start, out_shardings=plan_state(config, mesh).shardings.model)(dense)
        with new_folder(workdir):
            write_workdir(workdir, model, config, own_vocabulary(source, dense_config))


def prune_workdir(source: Path, workdir: Path, num_experts: int) -> None:
    """Writes a new workdir with only the experts that the latest checkpoint in `source` uses most.

    The run's evaluation split and number of batches decide the data on which choices are counted.

    Raises:
        UserError: names what does not fit or cannot be written.
    """
    check_new(workdir)
    config = load_workdir_config(source)
    smaller, mesh = pruned_config(config, num_experts), make_mesh(config.mesh)
    check_fit(smaller, mesh)
    vocabulary = None if config.model.family == "vision" else load_vocabulary(source, config)
    path = "" if vocabulary is None else str(vocabulary_path(source))  # a new vocabulary would have other ids
    data = prepare_data(dataclasses.replace(config.data, vocabulary=path))
    with jax.set_mesh(mesh):
        _, model = load_model(config, source, mesh)
        usage = expert_usage(model, config, _held_out(config, data, mesh))
        shardings = plan_state(smaller, mesh).shardings.model
        model = jax.jit(lambda model: prune(model, config, usage, num_experts), out_shardings=shardings)(model)
        with new_folder(workdir):
            write_workdir(workdir, model, smaller, vocabulary)


def _held_out(config: Config, data: Data, mesh: Mesh) -> Iterator[Batch]:
    """The batches of evaluation."""
    for corpus in data.corpora:
        for batch in data.evaluation_batches(corpus, config.evaluate.split, config.evaluate.batches):
            yield place_batch(batch, mesh)
