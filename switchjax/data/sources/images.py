"""Images in the idx format of MNIST."""

import gzip
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from switchjax.data.packages import Package, SourceUnavailable
from switchjax.data.sources.source import ImageSource, LabelledImages


def _idx_splits(members: Mapping[str, bytes]) -> dict[str, LabelledImages]:
    """Reads the splits train and test (`t10k`), each from a file of images and a file of labels."""
    arrays = {name.rpartition("/")[2]: _idx_array(name, data) for name, data in members.items()}
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (arrays.get(f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        if images is None or labels is None or images.ndim != 3 or labels.shape != images.shape[:1]:
            raise SourceUnavailable(f"its {split} images and labels are missing or differ in number")
        splits[split] = LabelledImages(images[..., None], labels)
    return splits


def _idx_array(name: str, data: bytes) -> UInt8[np.ndarray, "..."]:
    """Reads an idx file: two zeros, type (8 = bytes), number of axes; the size of each axis as int32; the values."""
    try:
        content = gzip.decompress(data)
        magic, num_axes = struct.unpack_from(">3sB", content)
        if magic != b"\0\0\x08":
            raise ValueError(f"it begins with {magic!r}")
        shape = struct.unpack_from(f">{num_axes}i", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise SourceUnavailable(f"{name} is not a readable idx file: {error}") from None


FASHION_MNIST = ImageSource(
    name="fashion_mnist",
    version="1.0.0",
    description="Fashion-MNIST: 70,000 gray images of 28 x 28 pixels in 10 classes",
    license="MIT",
    package=Package("debian", "dataset-fashion-mnist"),
    members=r".*/fashion-mnist/(train|t10k)-(images|labels)-idx[13]-ubyte\.gz",
    splits=_idx_splits,
    classes=(
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
)
