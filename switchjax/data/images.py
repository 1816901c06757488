"""Batches of labelled images."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Integer, UInt8

from switchjax.config import DataConfig, UserError
from switchjax.data.cache import cached
from switchjax.data.data import Data, fingerprint
from switchjax.data.datasets import ImageDataset, open_datasets
from switchjax.data.directory import locked_data_directory
from switchjax.data.rows import Row
from switchjax.data.splits import SPLITS

_SHIFT = 2
"""Largest shift of a training image, in pixels."""

_Image = UInt8[np.ndarray, "H W C"]


@dataclass(frozen=True)
class DecodedImages:
    """One split of a corpus: a sequence of (image, label).

    Attributes:
        images: memory-mapped; read from disk when needed.
        labels: the class of each image.
        checksum: CRC-32 of images and labels.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: Integer[np.ndarray, "N"]
    checksum: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[_Image, int]:
        return self.images[index], int(self.labels[index])


class ImageData(Data):
    """Batches for classification; all corpora share one image shape and the same classes.

    Attributes:
        image_shape: (H, W, C).
        classes: names of the labels 0, 1, ...
    """

    vocabulary: None = None

    def __init__(
        self,
        config: DataConfig,
        images: Mapping[str, Mapping[str, DecodedImages]],
        image_shape: tuple[int, ...],
        classes: tuple[str, ...],
    ) -> None:
        """Use `prepare`, which makes `images[corpus][split]`.

        Raises:
            UserError: if a corpus has no image to train on.
        """
        checksums = [
            [corpus, split, part.checksum] for corpus, splits in images.items() for split, part in splits.items()
        ]
        super().__init__(config, tuple(images), fingerprint(checksums))
        self.image_shape = image_shape
        self.classes = classes
        self._images = images
        self._check_trainable()

    @classmethod
    def prepare(cls, config: DataConfig) -> "ImageData":
        """Fetches, decodes and opens the corpora, and reuses what is already on disk. See `TextData.prepare`.

        Raises:
            UserError: if no corpus is available, one holds no labelled images, two differ in shape or classes, the
                directory cannot be written, or a record is corrupt.
        """
        with locked_data_directory(config.directory) as directory:
            opened = open_datasets(config.corpora, directory)
            corpora = {name: ImageDataset.of(dataset) for name, dataset in opened.items()}
            first = next(iter(corpora.values()))
            for corpus in corpora.values():
                if (corpus.image_shape, corpus.classes) != (first.image_shape, first.classes):
                    raise UserError(
                        f"corpora {first.name} and {corpus.name} have different image shapes or different classes"
                    )
            images = {
                name: {split: _decode(corpus, split, directory) for split in SPLITS} for name, corpus in corpora.items()
            }
        return cls(config, images, first.image_shape, first.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 to `num_classes - 1`."""
        return len(self.classes)

    def class_counts(self, corpus: str, split: str) -> Integer[np.ndarray, "classes"]:
        """The number of images of each class in a split."""
        return np.bincount(self._images[corpus][split].labels, minlength=self.num_classes)

    def _train_source(self, corpus: str) -> DecodedImages:
        return self._images[corpus]["train"]

    def _train_row(self, item: tuple[_Image, int], rng: np.random.Generator) -> Row:
        image, label = item
        return _row(shifted_and_flipped(image, rng) if self._config.augment else image, label)

    def _evaluation_rows(self, corpus: str, split: str) -> grain.MapDataset[Row]:
        # No shuffle: the order on disk is already random.
        return grain.MapDataset.source(self._images[corpus][split]).map(lambda item: _row(*item))

    def _empty_row(self) -> Row:
        return _row(np.zeros(self.image_shape, np.uint8), -1)


def _row(image: _Image, label: int) -> Row:
    return {"images": image, "labels": np.array(label, np.int32)}


def shifted_and_flipped(image: _Image, rng: np.random.Generator) -> _Image:
    """Crops at random from the image with a border of zeros; mirrors the crop with probability 1/2."""
    height, width, channels = image.shape
    bordered = np.zeros((height + 2 * _SHIFT, width + 2 * _SHIFT, channels), np.uint8)
    bordered[_SHIFT:-_SHIFT, _SHIFT:-_SHIFT] = image
    top, left, mirrored = rng.integers([2 * _SHIFT + 1, 2 * _SHIFT + 1, 2])
    cropped = bordered[top : top + height, left : left + width]
    return cropped[:, ::-1] if mirrored else cropped


def _decode(dataset: ImageDataset, split: str, directory: Path) -> DecodedImages:
    """The images of a split, decoded once and then kept on disk."""
    name = Path("images", dataset.name, dataset.version, split)
    return cached(
        directory,
        name,
        lambda folder: _load(folder, dataset.image_shape),
        lambda folder: _write(dataset, split, folder),
    )


def _load(folder: Path, shape: tuple[int, ...]) -> DecodedImages:
    checksum = int(json.loads((folder / "facts.json").read_text())["checksum"])
    labels = np.fromfile(folder / "labels.bin", "<i4")
    size = (folder / "images.bin").stat().st_size
    if size != len(labels) * np.prod(shape):
        raise ValueError("its files have contradictory sizes")
    # np.memmap refuses an empty file.
    pixels = np.memmap(folder / "images.bin", np.uint8, "r") if size else np.zeros(0, np.uint8)
    return DecodedImages(pixels.reshape(-1, *shape), labels, checksum)


def _write(dataset: ImageDataset, split: str, folder: Path) -> None:
    folder.mkdir()
    checksum = 0
    with (folder / "images.bin").open("wb") as pixels, (folder / "labels.bin").open("wb") as classes:
        for images, labels in dataset.images(split):
            for file, content in ((pixels, images.tobytes()), (classes, labels.astype("<i4").tobytes())):
                checksum = zlib.crc32(content, checksum)
                file.write(content)
    (folder / "facts.json").write_text(json.dumps({"checksum": checksum}))
