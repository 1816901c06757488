"""A small corpus of images of our own, prepared without the network from files like MNIST's."""

import gzip
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from switchjax.data import packages
from switchjax.data.packages import Package
from switchjax.data.sources import SOURCES, ImageSource, LabelledImages
from switchjax.data.sources.images import FASHION_MNIST

SHAPE = (6, 5, 1)
"""Not square, so that no axes can be confused."""
CLASSES = ("circle", "line", "spiral")
SIZES = {"train": 60, "test": 12}


def pictures(split: str, shape: tuple[int, int, int] = SHAPE) -> LabelledImages:
    """Noise, so that no two are equal; classes in turn."""
    rng = np.random.default_rng(len(split))
    images = rng.integers(0, 256, (SIZES[split], *shape), np.uint8)
    return LabelledImages(images, np.arange(SIZES[split], dtype=np.uint8) % len(CLASSES))


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">3sB{values.ndim}i", b"\0\0\x08", values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


def members(shape: tuple[int, int, int] = SHAPE) -> dict[str, bytes]:
    """The four files of a package."""
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = pictures(split, shape)
        files[f"x/{prefix}-images-idx3-ubyte.gz"] = idx(images[..., 0])
        files[f"x/{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
    return files


def damaged() -> dict[str, bytes]:
    files = members()
    return {name: content[:-20] if "images" in name else content for name, content in files.items()}


def install(patch: pytest.MonkeyPatch) -> None:
    """`doodles` and the square `tiles` can be had; `scribbles` are damaged."""
    archives: Mapping[str, Callable[[], dict[str, bytes]]] = {
        "doodles": members,
        "tiles": lambda: members((6, 6, 1)),
        "scribbles": damaged,
    }

    def fetch(name: str, folder: Path) -> Path:
        (folder / "package.pictures").write_text(name)
        return folder / "package.pictures"

    def read(archive: Path, pattern: object) -> list[tuple[str, bytes]]:
        return list(archives[archive.read_text()]().items())

    for name in archives:
        package = Package("pictures", name)
        source = ImageSource(name, "1.0.0", "noise", "none", package, ".*", FASHION_MNIST.splits, CLASSES)
        patch.setitem(SOURCES, name, source)
    patch.setitem(packages._FETCHERS, "pictures", fetch)
    patch.setitem(packages._READERS, ".pictures", read)
