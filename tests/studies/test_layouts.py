"""Layouts: what a program written by hand communicates, and the picture. What real ones do: tests/training."""

import xml.etree.ElementTree as ElementTree

import pytest
from switchjax.studies.layouts import LAYOUTS, Counted, Route, communication, tabulate_layouts

from switchjax.config import Config
from switchjax.planning import hlo
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.layout_picture import draw_layouts, layout_arrays
from tests.test_configs import MODULES, config_of

STEP = """
ENTRY %main (a: f32[16,64]) -> f32[16,64] {
  %a = f32[16,64]{1,0} parameter(0)
  %s = f32[] constant(1)
  %x = f32[16,64]{1,0} all-to-all(%a), replica_groups={{0,2},{1,3}}, metadata={op_name="jit(f)/jvp()/while/exchange"}
  %y = f32[16,64]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/transpose(jvp())/dot"}
  %z = f32[16,64]{1,0} all-reduce(%y), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/transpose(jvp())/dot"}
  %n = f32[] all-reduce(%s), replica_groups={}, metadata={op_name="jit(f)/reduce_sum"}
  ROOT %w = f32[16,64]{1,0} all-reduce(%z), replica_groups={{0},{1},{2},{3}}, metadata={op_name="jit(f)/psum"}
}
"""


def test_collectives_are_told_apart_by_phase_kind_and_axes() -> None:
    mesh, whole = {"data": 1, "expert": 2, "model": 2}, 16 * 64 * 4
    found = communication(hlo.parse(STEP), mesh)
    assert found == {
        Route("forward", "all-to-all", ("expert",)): Traffic(1, whole),
        Route("backward", "all-reduce", ("model",)): Traffic(2, 2 * whole),
        Route("update", "all-reduce", ("expert", "model")): Traffic(1, 4),
    }
    assert len(communication(hlo.parse(STEP), mesh, least=8)) == 2

    rows = tabulate_layouts({"both": Counted(mesh, found)}).splitlines()[2:]
    cells = "1 all-to-all over expert, 4.0 KiB | 2 all-reduce over model, 8.0 KiB | 1 all-reduce over expert x model"
    assert rows == [f"| both | 1 x 2 x 2 | {cells}, 4 bytes |"]


def test_the_command_measures_the_layouts_of_the_config() -> None:
    assert tuple(MODULES["layouts"].SIZES) == LAYOUTS


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return {name: config_of("layouts", name) for name in LAYOUTS}


# Different parts of a dense layer's weights, of the experts' and of the tokens, on 8 devices: figure 9 of the paper.
PARTS = {
    "data": (1, 1, 8),
    "model": (8, 8, 1),
    "model-data": (2, 2, 4),
    "expert-data": (1, 8, 8),
    "expert-model-data": (2, 4, 4),
    "fsdp": (8, 8, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_devices_hold_the_parts_of_the_papers_figure(configs: dict[str, Config], layout: str) -> None:
    for array, parts in zip(layout_arrays(configs[layout]), PARTS[layout], strict=True):
        assert len(array.blocks) == 8
        assert len(array.parts) == parts
        sizes = {tuple(stop - start for start, stop in block) for block in array.blocks}
        assert len(sizes) == 1, "devices hold equally much"


def test_the_picture_fills_what_a_device_holds(configs: dict[str, Config]) -> None:
    root = ElementTree.fromstring(draw_layouts({name: configs[name] for name in ("model-data", "fsdp")}))
    filled = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill") not in ("#eeeeee", "#ffffff")]
    # A rectangle for each matrix that a device holds of: one, all 8 experts, the tokens; 8 devices, 2 layouts.
    assert len(filled) == 2 * 8 * (1 + 8 + 1)
    first, second = filled[0], filled[1]
    assert (float(first.get("width") or 0), float(first.get("height") or 0)) == (32, 64)  # half of the columns
    assert first.get("fill") != second.get("fill")
    said = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"2 parts, 4 copies of each", "8 parts", "mesh.sharded=parameters"} <= said
