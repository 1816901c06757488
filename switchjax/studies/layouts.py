"""What a layout communicates, counted in the compiled train step: section 5 of the Switch Transformer's paper, checked.

A layout is the section `mesh` of a config; `configs/layouts.py` has the paper's five (figure 9) and sharded parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple

from switchjax.accounting.hardware import show_bytes
from switchjax.config import Config
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.planning.hlo import Program, parse_compiled
from switchjax.planning.hlo_collectives import Collective, Traffic, axes_between, collectives, traffic
from switchjax.studies.markdown import show_row
from switchjax.training.state import plan_state
from switchjax.training.step import lower_train_step

LAYOUTS = ("data", "model", "model-data", "expert-data", "expert-model-data", "fsdp")
"""Arguments of configs/layouts.py."""
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"


class Route(NamedTuple):
    """Which collectives belong together."""

    phase: str
    """forward, backward (what it computes again included) or update."""
    kind: str
    axes: tuple[str, ...]
    """Of the mesh: those along which bytes travel."""


def communication(program: Program, mesh: Mapping[str, int], least: int = 0) -> dict[Route, Traffic]:
    """Collectives of a train step by route.

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
    """Of an operation by its name in the JAX program: what differentiation made of it."""
    if "transpose(" in source:
        return BACKWARD
    return FORWARD if "jvp(" in source else UPDATE


class Counted(NamedTuple):
    """A layout's mesh and what a train step communicates on it."""

    mesh: Mapping[str, int]
    routes: Mapping[Route, Traffic]


def count_layout(config: Config) -> Counted:
    """Compiles the train step of a config; sums of less than a token's size are left out.

    Raises:
        UserError: if the config does not fit its mesh.
    """
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    program = parse_compiled(lower_train_step(config, plan_state(config, mesh), mesh).compile())
    return Counted(mesh.shape, communication(program, mesh.shape, least=4 * config.model.d_model))


def tabulate_layouts(layouts: Mapping[str, Counted]) -> str:
    """What each layout communicates in a step, as a table in Markdown."""
    lines = ["| layout | data x expert x model | forward | backward | update |", "|---|---|---|---|---|"]
    for name, (mesh, routes) in layouts.items():
        phases = [_cell(routes, phase) for phase in (FORWARD, BACKWARD, UPDATE)]
        lines.append(show_row([name, " x ".join(map(str, mesh.values())), *phases]))
    return "\n".join(lines)


def _cell(routes: Mapping[Route, Traffic], phase: str) -> str:
    parts = [
        f"{found.count} {route.kind} over {' x '.join(route.axes)}, {show_bytes(found.bytes)}"
        for route, found in routes.items()
        if route.phase == phase
    ]
    return "<br>".join(parts) or "-"
