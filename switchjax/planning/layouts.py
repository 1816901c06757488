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
    """The key by which collectives are counted."""

    phase: str
    """forward, backward (including recomputation) or update."""
    kind: str
    axes: tuple[str, ...]
    """Axes of the mesh along which bytes travel."""


def layout_communication(config: Config) -> dict[Route, Traffic]:
    """Compiles a config's train step and counts its collectives, without those of fewer bytes than a float32 token."""
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    program = parse_compiled(lower_train_step(config, plan_state(config, mesh), mesh).compile())
    return communication(program, mesh.shape, least=4 * config.model.d_model)


def communication(program: Program, mesh: Mapping[str, int], least: int = 0) -> dict[Route, Traffic]:
    """Counts the collectives of a compiled step on a mesh of these sizes, route by route.

    Collectives of fewer than `least` bytes do not count: they sum losses, metrics and norms.
    """
    routes: dict[Route, list[Collective]] = {}
    for found in collectives(program):
        axes = axes_between(found.group, mesh)
        if axes and found.bytes >= least:
            routes.setdefault(Route(_phase(found.source), found.kind, axes), []).append(found)
    return {route: traffic(routes[route])[route.kind] for route in sorted(routes)}


def _phase(source: str) -> str:
    """The phase of an operation, from the marks that differentiation leaves in its name."""
    if "transpose(" in source:
        return BACKWARD
    return FORWARD if "jvp(" in source else UPDATE
