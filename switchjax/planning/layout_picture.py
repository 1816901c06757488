"""Draws what each device holds, from real shardings, like figure 9 of the Switch Transformer's paper."""

from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import NamedSharding

from switchjax.config import Config, UserError
from switchjax.models.families import FAMILIES
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.parallel.sharding import named_leaves, partition_spec
from switchjax.training.state import plan_state

Block = tuple[tuple[int, int], ...]
"""Start and stop in each dimension of an array."""

_COLUMNS = 4
"""Devices in a row of a panel, and experts in a row of a device."""
_PITCH = 1.15
"""Distance between the corners of neighbouring devices; their squares have side 1."""


class ShardedArray(NamedTuple):
    """An array and what each device of a mesh holds of it."""

    title: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    """One for each device, in the order of the mesh."""

    @property
    def parts(self) -> list[Block]:
        """The different blocks, first to last."""
        return sorted(set(self.blocks))


def held_blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """The block of an array that each device holds, in the order of the mesh."""
    indices = sharding.devices_indices_map(shape)
    return tuple(
        tuple(part.indices(size)[:2] for part, size in zip(indices[device], shape, strict=True))
        for device in sharding.mesh.devices.flat
    )


def layout_arrays(config: Config) -> list[ShardedArray]:
    """The first dense layer's W_in [D, F], the first experts' [E, D, F], and tokens [B, L], on the config's mesh."""
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    plan = plan_state(config, mesh)
    shapes, shardings = named_leaves(plan.shapes.model), named_leaves(plan.shardings.model)
    arrays = []
    for title, ending in (("a dense layer's weights", "/ff/w_in"), ("experts' weights", "/experts/w_in")):
        name = next(name for name in shapes if name.endswith(ending))
        # A loop stacks its layers along the first dimension, which no mesh axis divides.
        blocks = tuple(block[1:] for block in held_blocks(shardings[name], shapes[name].shape))
        arrays.append(ShardedArray(title, shapes[name].shape[1:], blocks))
    tokens = next(iter(FAMILIES[config.model.family].batch_shapes(config).values()))
    rows = NamedSharding(mesh, partition_spec("batch"))
    return [*arrays, ShardedArray("tokens", tokens.shape, held_blocks(rows, tokens.shape))]


def draw_layouts(layouts: Mapping[str, Config]) -> str:
    """An SVG with a row for each layout, a panel for each array and in it a square for each device.

    Each square shows the whole array, rows down and columns across, experts side by side. The part that the device
    holds is filled; equal parts have equal colours. Raises a `UserError` if matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture of layouts needs matplotlib: pip install -c constraints.txt matplotlib") from None
    rows = [layout_arrays(config) for config in layouts.values()]
    figure = Figure(figsize=(13, 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for panels, arrays, (name, config) in zip(axes, rows, layouts.items(), strict=True):
        for panel, array in zip(panels, arrays, strict=True):
            _draw_panel(panel, array)
        settings = {"data": config.mesh.data, "expert": config.mesh.expert, "model": config.mesh.model}
        label = [f"mesh.{axis}={size}" for axis, size in settings.items() if size != 1]
        label += [f"mesh.sharded={config.mesh.sharded}"] if config.mesh.sharded != "none" else []
        panels[0].text(-2.6, 0.15, name, fontsize=13, weight="bold", va="center")
        panels[0].text(-2.6, 0.45, "\n".join(label), color="dimgrey", va="top")
    for panel, array in zip(axes[0], rows[0], strict=True):
        panel.set_title(f"{array.title}\n[{' x '.join(map(str, array.shape))}]", loc="left", fontsize=13)
    svg = StringIO()
    # "none" keeps text as text; a fixed salt and no date make equal layouts equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layouts"}):
        figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    return svg.getvalue()


def _caption(array: ShardedArray) -> str:
    parts, devices = len(array.parts), len(array.blocks)
    if parts == 1:
        return f"{devices} copies"
    return f"{parts} parts" + (f", {devices // parts} copies of each" if parts < devices else "")


def _draw_panel(panel: Any, array: ShardedArray) -> None:
    """Draws the devices in rows of four, each as a square of side 1."""
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    colours = colormaps["turbo"](np.linspace(0.08, 0.92, len(array.parts)))
    tiles = []
    for device, block in enumerate(array.blocks):
        row, column = divmod(device, _COLUMNS)
        colour = colours[array.parts.index(block)]
        for x, y, width, height, filled in _tiles(array.shape, block):
            corner = (column * _PITCH + x, row * _PITCH + y)
            tiles.append(Rectangle(corner, width, height, facecolor=colour if filled else "gainsboro", linewidth=0))
    panel.add_collection(PatchCollection(tiles, match_original=True, clip_on=False))
    rows = -(-len(array.blocks) // _COLUMNS)
    panel.set(xlim=(0, _COLUMNS * _PITCH), ylim=(rows * _PITCH + 0.2, 0), aspect="equal")
    panel.axis("off")
    panel.text(0, rows * _PITCH + 0.05, _caption(array), color="dimgrey", va="center")


def _tiles(shape: tuple[int, ...], block: Block) -> Iterator[tuple[float, float, float, float, bool]]:
    """Rectangles `(x, y, width, height, filled)`: each whole matrix of an array, then on top the block's part of it."""
    *stacked, (top, bottom), (left, right) = block
    count = shape[0] if stacked else 1
    first, last = stacked[0] if stacked else (0, 1)
    columns = min(count, _COLUMNS)
    width, height = 1 / columns, 1 / -(-count // columns)
    across, down = (0.92 if count > 1 else 1) * width / shape[-1], (0.92 if count > 1 else 1) * height / shape[-2]
    for tile in range(count):
        x, y = tile % columns * width, tile // columns * height
        yield x, y, shape[-1] * across, shape[-2] * down, False
        if first <= tile < last:
            yield x + left * across, y + top * down, (right - left) * across, (bottom - top) * down, True
