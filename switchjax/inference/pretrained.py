"""Loads trained text models for decoding and scoring, with MoE layers that drop no token."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from switchjax.config import Config, UserError, load_workdir_config
from switchjax.data.vocabulary import Vocabulary
from switchjax.models.families import TextModel
from switchjax.moe.routers import ROUTERS
from switchjax.parallel.mesh import check_parameters
from switchjax.training.evaluation import load_model
from switchjax.training.workdir import load_vocabulary


@dataclass(frozen=True)
class Pretrained:
    """A model with its config and vocabulary. Functions that use it run on the mesh in context (`jax.set_mesh`)."""

    config: Config
    model: TextModel
    vocabulary: Vocabulary


def dropless(config: Config) -> Config:
    """Changes `config` so that every expert has room for every token; the parameters stay the same.

    A token's output then depends neither on other rows nor on later tokens, as decoding token by token requires. Each
    token is a group of its own, so that any batch divides over a mesh.

    Raises:
        UserError: for a vision model, or for a router that looks at several tokens at once.
    """
    if config.model.family == "vision":
        raise UserError("decoding and scoring need a text model, but this run has model.family=vision")
    if not config.model.routes_groups:
        return config
    if (reason := ROUTERS[config.moe.router].noncausal) is not None:
        raise UserError(f"moe.router={config.moe.router} cannot route token by token: {reason}")
    moe = dataclasses.replace(config.moe, dropless=True, group_size=1, no_token_left_behind=0)
    return dataclasses.replace(config, moe=moe)


def load_pretrained(workdir: Path, mesh: Mesh, step: int = -1) -> Pretrained:
    """Loads the model of a workdir's checkpoint (-1: the latest) and lays it over `mesh`.

    Raises:
        UserError: if the checkpoint is missing, does not fit the mesh, or holds a model that `dropless` refuses.
    """
    config = dropless(load_workdir_config(workdir))
    # Each decoding step uses all weights: gathering them in every step would take longer than everything else.
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sharded="none"))
    check_parameters(config, mesh)
    _, model = load_model(config, workdir, mesh, step)
    assert isinstance(model, TextModel), "dropless refuses other models"
    return Pretrained(config, model, load_vocabulary(workdir, config))
