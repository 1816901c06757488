import dataclasses

import pytest

from switchjax.config import DataConfig, UserError
from switchjax.data.images import ImageData
from switchjax.data.prepare import prepare_data
from switchjax.data.text import TextData


def test_the_objective_decides_the_kind(config: DataConfig, image_config: DataConfig) -> None:
    assert isinstance(prepare_data(config), TextData)
    assert isinstance(prepare_data(dataclasses.replace(config, objective="causal")), TextData)
    assert isinstance(prepare_data(image_config), ImageData)


@pytest.mark.parametrize("objective", ["span_corruption", "causal"])
def test_images_are_no_text(config: DataConfig, image_config: DataConfig, objective: str) -> None:
    both = dataclasses.replace(config, objective=objective, corpora=("tales", "doodles"))
    with pytest.raises(UserError, match=r"corpus doodles holds images: set data\.objective=classification"):
        prepare_data(both)


def test_text_has_no_labels(config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"corpus tales holds no images with labels: data\.objective=classification"):
        prepare_data(dataclasses.replace(config, objective="classification", corpora=("tales",)))
