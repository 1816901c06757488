"""Counts what each layout over a mesh communicates in a train step, and draws what each device holds."""

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
    return "<br>".join(f"{one.count} {route}, {show_bytes(one.bytes)}" for route, one in routes.items()) or "-"


@dataclass(frozen=True)
class LayoutRow:
    """What a layout communicates in each phase of a train step: `all-to-all over expert` -> collectives."""

    layout: Annotated[str, text("layout")]
    mesh: Annotated[dict[str, int], text("data x expert x model", lambda mesh: " x ".join(map(str, mesh.values())))]
    forward: Annotated[dict[str, Traffic], text(FORWARD, _show_routes)]
    backward: Annotated[dict[str, Traffic], text(BACKWARD, _show_routes)]
    update: Annotated[dict[str, Traffic], text(UPDATE, _show_routes)]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/layouts.py", help="config file of the layouts")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what each device holds there, as SVG")


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
    phases: dict[str, dict[str, Traffic]] = {FORWARD: {}, BACKWARD: {}, UPDATE: {}}
    for route, found in routes.items():
        phases[route.phase][f"{route.kind} over {' x '.join(route.axes)}"] = found
    return LayoutRow(name, dict(make_mesh(config.mesh).shape), *phases.values())
