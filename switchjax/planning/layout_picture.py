"""Figure 9 of the Switch Transformer's paper, drawn from real shardings: what each device holds."""

import colorsys
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from xml.sax.saxutils import escape

from jax.sharding import NamedSharding

from switchjax.config import Config
from switchjax.models.families import FAMILIES
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.parallel.sharding import named_leaves, partition_spec
from switchjax.training.state import plan_state

Block = tuple[tuple[int, int], ...]
"""Start and stop in each dimension of an array."""

_COLUMNS = 4
"""Devices side by side in a panel, and experts side by side in a device."""
_CELL, _GAP = 64, 10
_PANEL = _COLUMNS * (_CELL + _GAP)
_LEFT, _TOP, _BETWEEN = 300, 96, 44
_FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"
_INK, _GREY, _EMPTY = "#222222", "#777777", "#eeeeee"


class Held(NamedTuple):
    """An array, and what each device of a mesh holds of it."""

    title: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    """In the order of the mesh."""

    @property
    def parts(self) -> list[Block]:
        """The different ones, first to last."""
        return sorted(set(self.blocks))


def held_blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """What each device holds of an array, device by device in the order of the mesh."""
    indices = sharding.devices_indices_map(shape)
    return tuple(
        tuple(part.indices(size)[:2] for part, size in zip(indices[device], shape, strict=True))
        for device in sharding.mesh.devices.flat
    )


def layout_arrays(config: Config) -> list[Held]:
    """W_in [D, F] of the first dense layer, [E, D, F] of the first experts, and tokens [B, L], on the config's mesh.

    Raises:
        UserError: if the config does not fit its mesh.
    """
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    plan = plan_state(config, mesh)
    shapes, shardings = named_leaves(plan.shapes.model), named_leaves(plan.shardings.model)
    arrays = []
    for title, ending in (("a dense layer's weights", "/ff/w_in"), ("experts' weights", "/experts/w_in")):
        name = next(name for name in shapes if name.endswith(ending))
        # Of the layers that a loop stacks, one: no axis divides them.
        blocks = tuple(block[1:] for block in held_blocks(shardings[name], shapes[name].shape))
        arrays.append(Held(title, shapes[name].shape[1:], blocks))
    tokens = next(iter(FAMILIES[config.model.family].batch_shapes(config).values()))
    rows = NamedSharding(mesh, partition_spec("batch"))
    return [*arrays, Held("tokens", tokens.shape, held_blocks(rows, tokens.shape))]


def draw_layouts(layouts: Mapping[str, Config]) -> str:
    """An SVG with a row for each layout; its panels are the arrays, their squares the devices.

    Each square is the whole array, rows down and columns across, experts one beside the other; what the device holds is
    filled. Equal colours are equal parts.

    Raises:
        UserError: as `layout_arrays`.
    """
    rows = {name: layout_arrays(config) for name, config in layouts.items()}
    width = _LEFT + 3 * (_PANEL + _BETWEEN)
    pieces, y = [], _TOP
    for i, array in enumerate(next(iter(rows.values()))):
        sizes = " x ".join(map(str, array.shape))
        pieces += [
            _text(_panel_x(i), 44, array.title, 20, "bold"),
            _text(_panel_x(i), 68, f"[{sizes}]", 16, fill=_GREY),
        ]
    for name, arrays in rows.items():
        height = -(-len(arrays[0].blocks) // _COLUMNS) * (_CELL + _GAP)
        pieces.append(_text(24, y + 28, name, 22, "bold"))
        for line, setting in enumerate(_settings(layouts[name])):
            pieces.append(_text(24, y + 54 + 22 * line, setting, 16, fill=_GREY))
        for i, array in enumerate(arrays):
            pieces += _panel(array, _panel_x(i), y)
            pieces.append(_text(_panel_x(i), y + height + 12, _says(array), 16, fill=_GREY))
        y += height + _BETWEEN
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {y}' width='{width}' height='{y}'>"
    return "\n".join([head, _rect(0, 0, width, y, "#ffffff"), *pieces, "</svg>", ""])


def _panel_x(column: int) -> int:
    return _LEFT + column * (_PANEL + _BETWEEN)


def _settings(config: Config) -> list[str]:
    mesh = config.mesh
    sizes = {"data": mesh.data, "expert": mesh.expert, "model": mesh.model}
    sharded = [f"mesh.sharded={mesh.sharded}"] if mesh.sharded != "none" else []
    return [f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1] + sharded


def _says(array: Held) -> str:
    parts, devices = len(array.parts), len(array.blocks)
    if parts == 1:
        return f"{devices} copies"
    return f"{parts} parts" + (f", {devices // parts} copies of each" if parts < devices else "")


def _panel(array: Held, x: int, y: int) -> Iterator[str]:
    colours = dict(zip(array.parts, _colours(len(array.parts)), strict=True))
    for device, block in enumerate(array.blocks):
        row, column = divmod(device, _COLUMNS)
        yield from _square(array.shape, block, x + column * (_CELL + _GAP), y + row * (_CELL + _GAP), colours[block])


def _square(shape: tuple[int, ...], block: Block, x: float, y: float, colour: str) -> Iterator[str]:
    """A whole array and in it a block: of a matrix one tile, of a stack of matrices one tile each."""
    *stacked, (top, bottom), (left, right) = block
    count = shape[0] if stacked else 1
    first, last = stacked[0] if stacked else (0, 1)
    columns = min(count, _COLUMNS)
    width, height = _CELL / columns, _CELL / -(-count // columns)
    margin = 1 if count > 1 else 0
    for tile in range(count):
        tile_x, tile_y = x + tile % columns * width + margin, y + tile // columns * height + margin
        across, down = (width - 2 * margin) / shape[-1], (height - 2 * margin) / shape[-2]
        yield _rect(tile_x, tile_y, width - 2 * margin, height - 2 * margin, _EMPTY)
        if first <= tile < last:
            yield _rect(
                tile_x + left * across, tile_y + top * down, (right - left) * across, (bottom - top) * down, colour
            )


def _colours(count: int) -> list[str]:
    """As many hues, one after the other around the circle."""
    rgb = [colorsys.hls_to_rgb((0.58 + i / count) % 1, 0.52, 0.58) for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in rgb]


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f"<rect x='{x:.2f}' y='{y:.2f}' width='{width:.2f}' height='{height:.2f}' fill='{fill}'/>"


def _text(x: float, y: float, text: str, size: int, weight: str = "normal", fill: str = _INK) -> str:
    style = f"{_FONT} font-size='{size}' font-weight='{weight}' fill='{fill}'"
    return f"<text x='{x}' y='{y}' {style}>{escape(text)}</text>"
