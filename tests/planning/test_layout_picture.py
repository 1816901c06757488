"""The picture of layouts: the parts that devices hold, and the drawing of them."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from switchjax.config import Config, UserError
from switchjax.planning.layout_picture import draw_layouts, layout_arrays
from switchjax.studies.layout_study import LAYOUTS
from tests.test_configs import config_of

SVG = "{http://www.w3.org/2000/svg}"


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
    pytest.importorskip("matplotlib")
    layouts = {name: configs[name] for name in ("model-data", "fsdp")}
    picture = draw_layouts(layouts)
    root = ElementTree.fromstring(picture)
    fills = [(path.get("style") or "").removeprefix("fill: ") for path in root.iter(f"{SVG}path")]
    filled = [fill for fill in fills if fill not in ("#dcdcdc", "#ffffff", "")]
    # A tile for each matrix that a device holds a part of: a dense one, 8 experts, the tokens; 8 devices, 2 layouts.
    assert len(filled) == 2 * 8 * (1 + 8 + 1)
    assert len(set(filled[:8])) == 2, "two parts of the dense matrix have two colours"
    said = {text.text for text in root.iter(f"{SVG}text")}
    assert {"2 parts, 4 copies of each", "8 parts", "mesh.sharded=parameters"} <= said
    assert picture == draw_layouts(layouts)


def test_without_matplotlib_one_line_says_what_to_install(
    configs: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt matplotlib"):
        draw_layouts({"data": configs["data"]})
