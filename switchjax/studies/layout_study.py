"""Tells what each layout over a mesh communicates in a train step, and draws what lies where."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax

from switchjax.accounting.hardware import show_bytes
from switchjax.config import Config, UserError
from switchjax.parallel.mesh import emulate_devices, make_mesh
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.layout_picture import draw_layouts
from switchjax.planning.layouts import BACKWARD, FORWARD, UPDATE, Route, layout_communication
from switchjax.studies.flags import LoadConfig
from switchjax.studies.report import text

LAYOUTS = ("data", "model", "model-data", "expert-data", "expert-model-data", "fsdp")
"""Arguments of configs/layouts.py."""


def _show_routes(routes: Mapping[str, Traffic]) -> str:
    shown = (f"{found.count} {route}, {show_bytes(found.bytes)}" for route, found in routes.items())
    return "<br>".join(shown) or "-"


@dataclass(frozen=True)
class LayoutRow:
    """What a layout communicates in a train step, as `all-to-all over expert` -> collectives, phase by phase."""

    layout: Annotated[str, text("layout")]
    mesh: Annotated[dict[str, int], text("data x expert x model", lambda mesh: " x ".join(map(str, mesh.values())))]
    forward: Annotated[dict[str, Traffic], text(FORWARD, _show_routes)]
    backward: Annotated[dict[str, Traffic], text(BACKWARD, _show_routes)]
    update: Annotated[dict[str, Traffic], text(UPDATE, _show_routes)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/layouts.py", help="file of the layouts")
    drawn = "draw each device's weights and tokens there, as SVG"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=drawn)


def measure(flags: Namespace, load: LoadConfig) -> Iterator[LayoutRow]:
    """Compiles the train step in each of `LAYOUTS` on emulated devices."""
    jax.config.update("jax_platforms", "cpu")
    layouts = {name: load(f"{flags.config}:{name}") for name in LAYOUTS}
    emulate_devices(layouts[LAYOUTS[0]].mesh)
    if flags.picture:
        try:
            flags.picture.write_text(draw_layouts(layouts))
        except OSError as error:
            raise UserError(f"--picture: cannot write {flags.picture} ({error.strerror})") from None
    for name, config in layouts.items():
        yield make_row(name, config, layout_communication(config))


def make_row(name: str, config: Config, routes: Mapping[Route, Traffic]) -> LayoutRow:
    """Makes the row of a layout from what its train step communicates."""

    def of_phase(phase: str) -> dict[str, Traffic]:
        return {
            f"{route.kind} over {' x '.join(route.axes)}": found
            for route, found in routes.items()
            if route.phase == phase
        }

    mesh = dict(make_mesh(config.mesh).shape)
    return LayoutRow(name, mesh, of_phase(FORWARD), of_phase(BACKWARD), of_phase(UPDATE))
