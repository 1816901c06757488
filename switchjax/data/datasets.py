"""Prepared datasets on disk: the project's own sources, or any TFDS dataset of text or labelled images.

`tensorflow_datasets` keeps the examples in ArrayRecord files, which are read without TensorFlow. Every dataset is read
as three splits that share no example: train, validation and test.
"""

import contextlib
import importlib
import importlib.util
import logging
import socket
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from switchjax.config import UserError, suggest
from switchjax.data.builders import prepare_source
from switchjax.data.directory import scratch_folder
from switchjax.data.packages import Downloads, SourceUnavailable
from switchjax.data.sources import SOURCES, LabelledImages
from switchjax.data.splits import split_expressions

_log = logging.getLogger(__name__)

_BLOCK = 512
"""Records in one read: reading them one by one is slow."""


@dataclass(frozen=True)
class Dataset:
    """One corpus, prepared on disk.

    Attributes:
        name: the corpus's name in `data.corpora`.
        version: version of the prepared data.
        builder: TFDS's reader.
    """

    name: str
    version: str
    builder: tfds.core.DatasetBuilder

    def blocks(self, split: str) -> Iterator[list[dict[str, Any]]]:
        """Yields the examples of `split` in blocks, in the order on disk, which is random.

        Raises:
            UserError: for a corrupt record; it names the file and the record's index.
        """
        expression = split_expressions(list(self.builder.info.splits))[split]
        records = self.builder.as_data_source(split=expression)
        what = f"Reading {self.name} {split}"
        with tqdm(total=len(records), desc=what, unit=" examples", leave=False, disable=None) as bar:
            for start in range(0, len(records), _BLOCK):
                indices = range(start, min(start + _BLOCK, len(records)))
                try:
                    examples = records.__getitems__(list(indices))
                except Exception:  # each file format raises its own type for a corrupt record
                    raise self._first_corrupt(records, split, indices) from None
                yield examples
                bar.update(len(examples))

    def _first_corrupt(self, records: Any, split: str, indices: range) -> UserError:
        """The error for the first record of `indices` that cannot be read."""
        for index in indices:
            try:
                records[index]
            except Exception as error:
                reader, position = records.data_source._reader_idx_and_position(index)
                path = records.data_source._paths[reader]
                reason = str(error).splitlines()[0]
                return UserError(f"corrupt record {position} in {path} ({self.name} {split} {index}): {reason}")
        return UserError(f"{self.name} {split}: records {indices.start} to {indices.stop} cannot be read together")


@dataclass(frozen=True)
class TextDataset(Dataset):
    """A corpus of documents.

    Attributes:
        text_feature: the feature of an example that holds its text.
    """

    text_feature: str

    @classmethod
    def of(cls, dataset: Dataset, text_feature: str) -> "TextDataset":
        """Reads documents from the feature `text_feature`, or from `text` for the project's own sources.

        Raises:
            UserError: if the dataset has no such feature.
        """
        features = dataset.builder.info.features
        feature = "text" if dataset.name in SOURCES else text_feature
        if feature not in features and "image" in features:
            raise UserError(f"corpus {dataset.name} holds images: set data.objective=classification")
        if feature not in features:
            raise UserError(f"data.text_feature: {dataset.name} has no '{feature}'{suggest(feature, features)}")
        return cls(dataset.name, dataset.version, dataset.builder, feature)

    def texts(self, split: str) -> Iterator[list[str]]:
        """Yields the texts of `split` in blocks; raises as `blocks` does."""
        for block in self.blocks(split):
            values = (example[self.text_feature] for example in block)
            yield [text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in values]


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """A corpus of labelled images, all of one shape.

    Attributes:
        image_shape: (H, W, C).
        classes: names of the labels 0, 1, ...
    """

    image_shape: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "ImageDataset":
        """Reads images from the features `image` and `label`.

        Raises:
            UserError: if the features are missing, the shapes of images vary, or no installed package decodes them.
        """
        features = dict(dataset.builder.info.features.items())
        image, label = features.get("image"), features.get("label")
        if image is None or not isinstance(label, tfds.features.ClassLabel):
            raise UserError(
                f"corpus {dataset.name} holds no images with labels: data.objective=classification needs the features "
                f"image and label, but the corpus has {', '.join(features)}"
            )
        shape = image.shape
        if len(shape) != 3 or None in shape or image.np_dtype != np.uint8:
            raise UserError(
                f"corpus {dataset.name}: images must be uint8 of one shape, not {image.np_dtype} of shape {shape}"
            )
        if isinstance(image, tfds.features.Image) and not any(map(importlib.util.find_spec, ("PIL", "cv2"))):
            raise UserError(f"corpus {dataset.name} holds encoded images: pip install pillow")
        return cls(dataset.name, dataset.version, dataset.builder, shape, tuple(label.names))

    def images(self, split: str) -> Iterator[LabelledImages]:
        """Yields the images of `split` in blocks; raises as `blocks` does."""
        for block in self.blocks(split):
            images = np.stack([example["image"] for example in block])
            yield LabelledImages(images, np.array([example["label"] for example in block], np.int32))


def open_datasets(names: tuple[str, ...], directory: Path) -> dict[str, Dataset]:
    """Opens the named datasets and prepares those that are not on disk yet; the caller holds `directory.locked`.

    A dataset that is unavailable here is skipped with a warning.

    Raises:
        UserError: if all of them are unavailable.
    """
    datasets = {}
    bar = tqdm(names, "Preparing corpora", leave=False, disable=None)
    with scratch_folder(directory) as folder, bar:
        downloads = Downloads(folder)
        for name in bar:
            bar.set_postfix_str(name)
            try:
                builder = _open(name, directory / "datasets", downloads)
            except SourceUnavailable as error:
                _log.warning("Skipping corpus %s: %s", name, error)
            else:
                datasets[name] = Dataset(name, str(builder.version), builder)
    if not datasets:
        raise UserError(f"no corpus is available here: {', '.join(names)} (the warnings above say why)")
    return datasets


def _open(name: str, directory: Path, downloads: Downloads) -> tfds.core.DatasetBuilder:
    if name not in SOURCES:
        return _tfds_builder(name, directory, downloads.folder)
    source = SOURCES[name]
    path = directory / source.name / source.version
    if not path.exists():
        prepare_source(source, path, downloads)
    return tfds.builder_from_directory(path)


def _tfds_builder(name: str, directory: Path, downloads: Path) -> tfds.core.DatasetBuilder:
    """Opens a dataset of TFDS's catalogue; TFDS prepares it if it is not on disk.

    Raises:
        SourceUnavailable: if TFDS cannot prepare it here, for any reason.
    """
    try:
        for room in ("text", "image_classification"):
            importlib.import_module(f"tensorflow_datasets.{room}")  # registers older builders, e.g. c4 and cifar10
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        if not builder.is_prepared():
            _resolve_hosts(builder)
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare(download_dir=downloads)
    except tfds.core.DatasetNotFoundError:
        raise SourceUnavailable(
            f"neither switchjax nor TFDS has a dataset of this name{suggest(name, SOURCES)}"
        ) from None
    except (Exception, SystemExit) as error:  # a builder is foreign code that uses the network: it can raise anything
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceUnavailable(f"TFDS cannot prepare it: {reason}") from None
    return builder


def _resolve_hosts(builder: tfds.core.DatasetBuilder) -> None:
    """Raises `SourceUnavailable` if a host is unknown; without this check TFDS retries each address for minutes."""
    for host in sorted({urllib.parse.urlsplit(address).hostname or "" for address in builder.url_infos or ()}):
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise SourceUnavailable(f"{host} cannot be reached ({error.strerror})") from None
