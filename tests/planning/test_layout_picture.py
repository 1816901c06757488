"""The picture of layouts: what devices hold in each, and that the drawing shows it."""

import xml.etree.ElementTree as ElementTree

import pytest

from switchjax.config import Config
from switchjax.planning.layout_picture import draw_layouts, layout_arrays
from switchjax.studies.layout_study import LAYOUTS
from tests.test_configs import config_of


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
