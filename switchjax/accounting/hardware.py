"""TPU chips, their slices, and the peaks of GPUs.

Figures are a chip's, from Google's pages (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; read in 2026). The pages
give the bandwidth of all links in both directions together; here it is one link's in one direction, which agrees with
their bisection bandwidths (v5e: 16 rings x 2 links x 50 GB/s = 1.6 TB/s of a 16x16 pod).
"""

import math
import re
from dataclasses import dataclass

from switchjax.config import UserError, suggest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of TPU chip."""

    name: str
    memory: int
    """Bytes of HBM that a program may fill on one device, from libtpu 0.0.42's message when it does not fit."""
    flops: float
    """Peak bfloat16 FLOP/s."""
    memory_bandwidth: float
    """Bytes/s between HBM and the chip."""
    link_bandwidth: float
    """Bytes/s of one link between chips, in one direction."""
    dimensions: int
    """Dimensions of the mesh of chips; a chip has two links along each."""
    ring: int
    """A dimension whose size is a multiple of this is a ring: its ends are linked."""
    devices: int
    """JAX devices in a chip. `memory` is for each device; the devices share all other figures."""
    shapes: tuple[str, ...]
    """Slices by growing size: those of Google's tables, up to the largest that one job may have."""
    kinds: tuple[str, ...]
    """`jax.Device.device_kind` of its devices."""


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
    chip.name: chip
    for chip in (
        # 275 TFLOP/s, 32 GiB, 1200 GB/s; 6 links; bisection of 16x16x16: 24 TB/s = 256 rings x 2 links x 50 GB/s.
        # v4 and v5p: two cores work as one device (megacore). Chips form 4x4x4 cubes, so multiples of 4 are rings.
        Chip("v4", int(30.75 * GIB), 275e12, 1200e9, 50e9, 3, 4, 1, _CUBES, ("TPU v4",)),
        # 197 TFLOP/s, 16 GB, 819 GB/s; 4 links, 400 GB/s in both directions. Only a full side of 16 is a ring.
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 50e9, 2, 16, 1, _SQUARES, ("TPU v5 lite", "TPU v5e")),
        # 459 TFLOP/s, 95 GiB, 2765 GB/s; 6 links, 1200 GB/s in both directions.
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 100e9, 3, 4, 1, (*_CUBES, "16x16x24"), ("TPU v5", "TPU v5p")),
        # 918 TFLOP/s, 32 GB, 1638 GB/s; 4 links, 800 GB/s in both directions.
        Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 100e9, 2, 16, 1, _SQUARES, ("TPU v6 lite", "TPU v6e")),
        # Ironwood: 2307 TFLOP/s, 192 GiB, 7380 GB/s; 6 links, 1200 GB/s in both directions. Two chiplets, two devices.
        Chip("tpu7x", int(94.75 * GIB), 2307e12, 7380e9, 100e9, 3, 4, 2, (*_CUBES, "16x16x24"), ("TPU7x",)),
    )
}

_GPU_FLOPS = {"NVIDIA A100": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Start of `device_kind` -> peak dense bfloat16 FLOP/s, from NVIDIA's data sheets; H100 is the SXM version."""


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device of this `jax.Device.device_kind`, or None if it is unknown."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip.flops / chip.devices
    return next((flops for name, flops in _GPU_FLOPS.items() if device_kind.startswith(name)), None)


@dataclass(frozen=True)
class Slice:
    """A mesh of linked chips."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name that `--topology` and the compiler use."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def links(self, dimension: int) -> int:
        """Links across the middle of a line of chips along this dimension: 2 if it is a ring, otherwise 1."""
        return 2 if self.shape[dimension] % self.chip.ring == 0 else 1


def find_chip(name: str) -> Chip:
    """The chip of this name; raises a `UserError` that suggests one if there is none."""
    if name not in CHIPS:
        raise UserError(f"--topology: no chip '{name}'{suggest(name, CHIPS)}")
    return CHIPS[name]


def parse_slice(topology: str) -> Slice:
    """The slice that `CHIP:AxB[xC]` names.

    Raises:
        UserError: for another form, an unknown chip, a wrong number of dimensions or more chips than a job may have.
    """
    name, _, shape = topology.partition(":")
    chip = find_chip(name)
    known = ", ".join(chip.shapes)
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{chip.dimensions - 1}}}", shape):
        raise UserError(
            f"--topology: '{topology}' names no slice of {name}, such as {name}:{chip.shapes[-1]} ({known})"
        )
    parsed = Slice(chip, tuple(map(int, shape.split("x"))))
    largest = slices(chip)[-1]
    if parsed.chips > largest.chips:
        raise UserError(
            f"--topology: {topology} has {parsed.chips} chips, the largest slice is {largest.name} ({known})"
        )
    return parsed


def slices(chip: Chip) -> tuple[Slice, ...]:
    """The chip's slices by growing size."""
    return tuple(Slice(chip, tuple(map(int, shape.split("x")))) for shape in chip.shapes)


def show_bytes(count: float) -> str:
    """Bytes in the largest unit that keeps the number above 1: `25.3 GiB`."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {units[power]}"
