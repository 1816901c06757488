"""Counts what a layout communicates in the compiled train step, to check section 5 of the Switch Transformer's paper.

A layout is the section `mesh` of a config; `configs/layouts.py` has the paper's five (figure 9) and sharded parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple

from switchjax.config import Config
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.planning.hlo import Program, parse_compiled
from switchjax.planning.hlo_collectives import Collective, Traffic, axes_between, collectives, traffic
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"


class Route(NamedTuple):
    """Which collectives belong together."""

    phase: str
    """forward, backward (with what it recomputes) or update."""
    kind: str
    axes: tuple[str, ...]
    """Axes of the mesh along which bytes travel."""


def layout_communication(config: Config) -> dict[Route, Traffic]:
    """Compiles the train step of a config and counts its collectives; those smaller than a token are left out.

    Raises:
        UserError: if the config does not fit its mesh.
    """
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    program = parse_compiled(lower_train_step(config, plan_state(config, mesh), mesh).compile())
    return communication(program, mesh.shape, least=4 * config.model.d_model)


def communication(program: Program, mesh: Mapping[str, int], least: int = 0) -> dict[Route, Traffic]:
    """Counts the collectives of a train step, route by route.

    Args:
        program: the compiled step.
        mesh: sizes of the axes.
        least: collectives of fewer bytes are left out: sums of losses, metrics and norms.
    """
    routes: dict[Route, list[Collective]] = {}
    for found in collectives(program):
        axes = axes_between(found.group, mesh)
        if axes and found.bytes >= least:
            routes.setdefault(Route(_phase(found.source), found.kind, axes), []).append(found)
    return {route: traffic(routes[route])[route.kind] for route in sorted(routes)}


def _phase(source: str) -> str:
    """The phase of an operation, from what differentiation made of its name in the JAX program."""
    if "transpose(" in source:
        return BACKWARD
    return FORWARD if "jvp(" in source else UPDATE
