"""A trained text model as decoding and scoring take it: no token is dropped."""

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
    """A model with its config and vocabulary; all that uses it runs on the mesh in context (`jax.set_mesh`)."""

    config: Config
    model: TextModel
    vocabulary: Vocabulary


def dropless(config: Config) -> Config:
    """`config` with MoE layers in which every expert has room for every token.

    The same parameters fit. What becomes of a token then depends neither on the batch nor on what follows, as it must
    where a text is read token by token; each token is a group of its own, so that any batch divides over a mesh.

    Raises:
        UserError: for images, or for a router that looks at several tokens at once.
    """
    if config.model.family == "vision":
        raise UserError("decoding and scoring are for text, but this run has model.family=vision")
    if not config.model.routes_groups:
        return config
    if (reason := ROUTERS[config.moe.router].noncausal) is not None:
        raise UserError(f"moe.router={config.moe.router} cannot route token by token: {reason}")
    moe = dataclasses.replace(config.moe, dropless=True, group_size=1, no_token_left_behind=0)
    return dataclasses.replace(config, moe=moe)


def load_pretrained(workdir: Path, mesh: Mesh, step: int = -1) -> Pretrained:
    """The model of a workdir's checkpoint, the latest for -1, laid over `mesh`.

    Raises:
        UserError: if there is no such checkpoint, it does not fit the mesh, or it is of no use for text (`dropless`).
    """
    config = dropless(load_workdir_config(workdir))
    # Every token is decoded by all weights: gathering them for each would take longer than all the rest.
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sharded="none"))
    check_parameters(config, mesh)
    _, model = load_model(config, workdir, mesh, step)
    assert isinstance(model, TextModel), "dropless refuses the others"
    return Pretrained(config, model, load_vocabulary(workdir, config))
