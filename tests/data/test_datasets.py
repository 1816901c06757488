import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from switchjax.config import DataConfig, UserError
from switchjax.data import datasets
from switchjax.data.builders import quiet_tfds
from switchjax.data.datasets import TextDataset
from switchjax.data.directory import locked
from switchjax.data.splits import SPLITS
from switchjax.data.text import TextData
from tests.stories import small_source, story


def test_prepared_splits_are_disjoint(prepared: dict[str, TextDataset]) -> None:
    texts = [text for split in SPLITS for block in prepared["tales"].texts(split) for text in block]
    assert sorted(texts) == sorted(story(seed) for seed in range(150))


def test_a_corrupt_record_names_file_and_index(prepared: dict[str, TextDataset], tmp_path: Path) -> None:
    builder = prepared["tales"].builder
    folder = Path(shutil.copytree(builder.data_dir, tmp_path / "tales" / "1.0.0"))
    (path,) = folder.glob("*train*")
    os.truncate(path, 70_000)
    dataset = TextDataset("tales", "1.0.0", tfds.builder_from_directory(folder), "text")
    with pytest.raises(UserError, match=rf"corrupt record 0 in {path} \(tales train 0\)"):
        list(dataset.texts("train"))


def test_a_killed_preparation_is_never_used(config: DataConfig, tmp_path: Path) -> None:
    # Killed while it holds the lock and is writing.
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from switchjax.data.directory import locked, scratch_folder\n"
        "directory = Path(sys.argv[1])\n"
        "with locked(directory), scratch_folder(directory) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.glob("unfinished-*"))) == 1
    with locked(tmp_path):
        assert not list(tmp_path.glob("unfinished-*"))
        datasets.open_datasets(("tales",), tmp_path)


def test_a_new_version_is_prepared_beside_the_old(
    data: TextData, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1.0.0", "1.1.0"):
        monkeypatch.setitem(datasets.SOURCES, "tales", small_source("tales", 0, version))
        with locked(tmp_path):
            assert datasets.open_datasets(("tales",), tmp_path)["tales"].version == version
    assert sorted(path.name for path in (tmp_path / "datasets" / "tales").iterdir()) == ["1.0.0", "1.1.0"]


def test_a_tfds_dataset_on_disk_is_read_by_name_and_version(
    prepared: dict[str, TextDataset], config: DataConfig, tmp_path: Path
) -> None:
    # What TFDS itself would have prepared: a name that is not ours, and another text feature.
    class Letters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"body": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
            return ((str(seed), {"body": story(seed)}) for seed in range(100))

    with quiet_tfds():
        Letters(data_dir=tmp_path / "datasets", file_format="array_record").download_and_prepare()
    with locked(tmp_path):
        (opened,) = datasets.open_datasets(("letters:2.0.0",), tmp_path).values()
    dataset = TextDataset.of(opened, "body")
    splits = [[text for block in dataset.texts(split) for text in block] for split in SPLITS]
    assert [len(texts) for texts in splits] == [90, 5, 5]
    assert sorted(text for texts in splits for text in texts) == sorted(story(seed) for seed in range(100))
    with pytest.raises(UserError, match=r"letters:2.0.0 has no 'bodi' .did you mean 'body'"):
        TextDataset.of(opened, "bodi")
    elsewhere = dataclasses.replace(config, corpora=("letters:2.0.0",), directory=str(tmp_path), text_feature="body")
    assert TextData.prepare(elsewhere).corpora == ("letters:2.0.0",)


def test_an_unknown_name_gets_a_suggestion(sources: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="no corpus is available here: moby_dik"):
        datasets.open_datasets(("moby_dik",), tmp_path)
    assert "did you mean 'moby_dick'" in caplog.messages[0]


def test_tensorflow_is_never_imported(config: DataConfig, data: TextData) -> None:
    script = (
        "from switchjax.config import DataConfig; from switchjax.data.text import TextData\n"
        "from switchjax.data import sources; from tests.stories import small_source\n"
        "sources.SOURCES.update(tales=small_source('tales', 0))\n"
        f"config = DataConfig(corpora=('tales',), directory={config.directory!r}, vocabulary_size=330)\n"
        "data = TextData.prepare(config)\n"
        "next(data.train_batches())\n"
        "import sys; assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
