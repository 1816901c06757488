import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from switchjax.config import DataConfig, UserError
from switchjax.data import datasets
from switchjax.data.builders import quiet_tfds
from switchjax.data.datasets import ImageDataset
from switchjax.data.images import ImageData, shifted_and_flipped
from switchjax.data.rows import HostBatch
from switchjax.data.splits import SPLITS
from tests.data.conftest import assert_resumes, assert_same, divided, joined, take
from tests.data.pictures import CLASSES, SHAPE, pictures

NUM_TRAIN = 57
"""95 % of the 60; the others are for validation."""


@pytest.fixture(scope="module")
def plain(image_config: DataConfig) -> ImageData:
    return ImageData.prepare(dataclasses.replace(image_config, augment=False))


@pytest.fixture(scope="module")
def augmented(image_config: DataConfig) -> ImageData:
    return ImageData.prepare(image_config)


def numbers(batches: list[HostBatch]) -> list[tuple[str, int]]:
    """Which pictures the rows hold; checks that each has its own label. Rows that fill up are left out."""
    known = {
        image.tobytes(): (split, number, label)
        for split in ("train", "test")
        for number, (image, label) in enumerate(zip(*pictures(split), strict=True))
    }
    found = []
    for batch in batches:
        for image, label in zip(batch["images"], batch["labels"], strict=True):
            if label >= 0:
                split, number, expected = known[image.tobytes()]
                assert label == expected
                found.append((split, number))
    return found


def test_shapes(augmented: ImageData) -> None:
    assert augmented.image_shape == SHAPE
    assert augmented.num_classes == 3
    assert augmented.classes == CLASSES
    assert augmented.vocabulary is None
    for batch in [*take(augmented.train_batches(), 2), *augmented.evaluation_batches("doodles", "test")]:
        assert (batch["images"].shape, batch["images"].dtype) == ((8, *SHAPE), np.uint8)
        assert (batch["labels"].shape, batch["labels"].dtype) == ((8,), np.int32)


def test_splits_part_the_images(plain: ImageData) -> None:
    found = {split: numbers(list(plain.evaluation_batches("doodles", split))) for split in SPLITS}
    assert len(found["train"]) == NUM_TRAIN
    assert sorted(found["train"] + found["validation"]) == [("train", number) for number in range(60)]
    assert sorted(found["test"]) == [("test", number) for number in range(12)]
    assert plain.class_counts("doodles", "test").tolist() == [4, 4, 4]


def test_an_epoch_holds_every_image_once_in_another_order(plain: ImageData, image_config: DataConfig) -> None:
    one = ImageData(dataclasses.replace(image_config, augment=False, batch_size=1), plain._images, SHAPE, CLASSES)
    batches = take(one.train_batches(), 2 * NUM_TRAIN)
    first, second = numbers(batches[:NUM_TRAIN]), numbers(batches[NUM_TRAIN:])
    assert sorted(first) == sorted(second) == sorted(numbers(list(plain.evaluation_batches("doodles", "train"))))
    assert first != second


def test_the_last_evaluation_batch_is_filled_up(augmented: ImageData) -> None:
    batches = list(augmented.evaluation_batches("doodles", "test"))
    assert len(batches) == 2
    assert (batches[1]["labels"][4:] == -1).all()
    assert (batches[1]["images"][4:] == 0).all()
    assert len(numbers(batches)) == 12  # As they are: nothing is shifted in evaluation.
    assert_same(batches[:1], list(augmented.evaluation_batches("doodles", "test", limit=1)))


def test_evaluation_ignores_the_training_seed(augmented: ImageData, image_config: DataConfig) -> None:
    other = ImageData.prepare(dataclasses.replace(image_config, seed=5))
    assert_same(
        list(augmented.evaluation_batches("doodles", "test")), list(other.evaluation_batches("doodles", "test"))
    )
    assert not np.array_equal(next(augmented.train_batches())["images"], next(other.train_batches())["images"])


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(augmented: ImageData, processes: int) -> None:
    shares = [take(augmented.train_batches(own), 10) for own in divided(processes)]
    assert_same(joined(shares), take(augmented.train_batches(), 10))
    shares = [list(augmented.evaluation_batches("doodles", "test", own=own)) for own in divided(processes)]
    assert_same(joined(shares), list(augmented.evaluation_batches("doodles", "test")))


def test_resumes_exactly(augmented: ImageData) -> None:
    assert_resumes(augmented)


def test_augmentation_is_a_shift_of_two_pixels_and_a_mirror() -> None:
    image = pictures("train").images[0]
    bordered = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = [bordered[top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
    expected = {crop.tobytes() for crop in crops} | {crop[:, ::-1].tobytes() for crop in crops}
    rng = np.random.default_rng(0)
    assert {shifted_and_flipped(image, rng).tobytes() for _ in range(1000)} == expected


def test_another_epoch_augments_anew(augmented: ImageData) -> None:
    seen = {image.tobytes() for batch in take(augmented.train_batches(), 5 * NUM_TRAIN) for image in batch["images"]}
    # 40 epochs of 50 variants: about 28 different ones of each image.
    assert len(seen) > 20 * NUM_TRAIN


def test_decoded_once(image_config: DataConfig, augmented: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDataset, "images", lambda *_: pytest.fail("decoded again"))
    again = ImageData.prepare(image_config)
    assert again.fingerprint == augmented.fingerprint
    assert_same(take(again.train_batches(), 2), take(augmented.train_batches(), 2))


@pytest.mark.parametrize("file", ["images.bin", "labels.bin", "facts.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_cache_is_made_again(
    image_config: DataConfig, augmented: ImageData, tmp_path: Path, file: str, damage: str
) -> None:
    config = dataclasses.replace(image_config, directory=str(tmp_path))
    ImageData.prepare(config)
    path = tmp_path / "images" / "doodles" / "1.0.0" / "train" / file
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    again = ImageData.prepare(config)
    assert again.fingerprint == augmented.fingerprint
    assert_same(take(again.train_batches(), 2), take(augmented.train_batches(), 2))


def test_the_fingerprint_changes_with_any_image(plain: ImageData, image_config: DataConfig) -> None:
    parts = plain._images["doodles"]
    other = {**parts, "test": dataclasses.replace(parts["test"], checksum=parts["test"].checksum ^ 1)}
    assert ImageData(image_config, {"doodles": other}, SHAPE, CLASSES).fingerprint != plain.fingerprint


def test_a_damaged_package_is_refused(image_config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="none of the corpora can be had here: scribbles"):
        ImageData.prepare(dataclasses.replace(image_config, corpora=("scribbles",)))
    assert "t10k-images-idx3-ubyte.gz is no readable idx file" in caplog.messages[0]


def test_a_corrupt_record_names_file_and_index(image_config: DataConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(image_config, directory=str(tmp_path))
    ImageData.prepare(config)
    (path,) = (tmp_path / "datasets").rglob("*-test.array_record*")
    os.truncate(path, 70_000)
    (tmp_path / "images" / "doodles" / "1.0.0" / "test" / "facts.json").unlink()
    with pytest.raises(UserError, match=rf"corrupt record 0 in {path} \(doodles test 0\)"):
        ImageData.prepare(config)


def write_glyphs(directory: Path, image: tfds.features.FeatureConnector, label: tfds.features.FeatureConnector) -> None:
    """What TFDS itself would have prepared."""

    class Glyphs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, object]]]:
            for number, (pixels, kind) in enumerate(zip(*pictures("train"), strict=True)):
                yield str(number), {"id": str(number), "image": pixels, "label": int(kind)}

    with quiet_tfds():
        Glyphs(data_dir=directory / "datasets", file_format="array_record").download_and_prepare()


PIXELS = tfds.features.Tensor(shape=SHAPE, dtype=np.uint8)
LABEL = tfds.features.ClassLabel(names=list(CLASSES))


def test_a_tfds_dataset_on_disk_is_read_by_name(image_config: DataConfig, tmp_path: Path) -> None:
    write_glyphs(tmp_path, PIXELS, LABEL)
    glyphs = dataclasses.replace(image_config, corpora=("glyphs:2.0.0",), directory=str(tmp_path), augment=False)
    data = ImageData.prepare(glyphs)
    found = [number for split in SPLITS for number in numbers(list(data.evaluation_batches("glyphs:2.0.0", split)))]
    assert sorted(found) == [("train", number) for number in range(60)]
    both = ImageData.prepare(dataclasses.replace(glyphs, corpora=("glyphs:2.0.0", "doodles"), rates=(3.0, 1.0)))
    assert both.corpora == ("glyphs:2.0.0", "doodles")
    assert len(numbers(take(both.train_batches(), 4))) == 32


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (
            tfds.features.Tensor(shape=(None, 5, 1), dtype=np.uint8),
            LABEL,
            r"images of shape \(None, 5, 1\) .* one shape",
        ),
        (PIXELS, tfds.features.Scalar(np.int64), "holds no images with labels"),
        (PIXELS, tfds.features.ClassLabel(num_classes=4), "glyphs:2.0.0 differ in the shape of images or in classes"),
    ],
)
def test_refuses_what_is_not_labelled_images_of_one_kind(
    image_config: DataConfig,
    tmp_path: Path,
    image: tfds.features.FeatureConnector,
    label: tfds.features.FeatureConnector,
    message: str,
) -> None:
    write_glyphs(tmp_path, image, label)
    with pytest.raises(UserError, match=message):
        ImageData.prepare(
            dataclasses.replace(image_config, corpora=("doodles", "glyphs:2.0.0"), directory=str(tmp_path))
        )


def test_says_what_decodes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": LABEL}
    builder = type("Builder", (), {"info": type("Info", (), {"features": features})})
    dataset = datasets.Dataset("mnist", "1.0.0", builder)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mnist holds encoded images: pip install pillow"):
        ImageDataset.of(dataset)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: name == "PIL")
    assert ImageDataset.of(dataset).image_shape == (28, 28, 1)


@pytest.mark.slow
def test_fashion_mnist_for_real(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Needs Debian's archive or a mirror of it, and fails where there is none."""
    directory = str(tmp_path_factory.mktemp("fashion_mnist"))
    data = ImageData.prepare(DataConfig("classification", ("fashion_mnist",), directory=directory))
    train, validation, test = (data.class_counts("fashion_mnist", split) for split in SPLITS)
    assert (train + validation).tolist() == [6000] * 10
    assert test.tolist() == [1000] * 10
    assert validation.sum() == 3000
    # Five standard deviations of a count of 3000 draws at 10 %.
    assert np.abs(validation - 300).max() < 83
    assert data.image_shape == (28, 28, 1)
    batch = next(data.train_batches())
    # The mean brightness of Fashion-MNIST is 72.9 of 255; here of 128 images, moved.
    assert 55 < batch["images"].mean() < 90
