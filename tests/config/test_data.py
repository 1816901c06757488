"""Fields of the section `data` change the batches."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from switchjax.config import DataConfig
from switchjax.data.span_corruption import SpanCorruption
from switchjax.data.text import TextData
from tests.data.conftest import take
from tests.data.spans import restore


@pytest.fixture(scope="module")
def data(data_config: DataConfig) -> TextData:
    return TextData.prepare(data_config)


@pytest.mark.parametrize(
    ("tokens", "noise", "spans"), [(11, 2, 1), (33, 5, 2), (52, 8, 3), (568, 85, 28), (2, 1, 1), (3, 1, 1)]
)
def test_noise_and_spans_are_rounded_and_never_none(tokens: int, noise: int, spans: int) -> None:
    """0.15 x 11 = 1.65, 0.15 x 33 = 4.95 in 5 / 3 = 1.67 spans, 0.15 x 52 = 7.8 in 8 / 3 = 2.67."""
    t5 = SpanCorruption(0.15, 3.0, 999, 512, 114)
    assert [count.item() for count in t5.num_noise(np.array([tokens]))] == [noise, spans]


@pytest.mark.parametrize(("density", "mean", "noise", "spans"), [(0.5, 3.0, 20, 7), (0.25, 5.0, 10, 2)])
def test_density_and_span_length_are_those_of_the_config(
    data: TextData, density: float, mean: float, noise: int, spans: int
) -> None:
    config = DataConfig(noise_density=density, mean_span_length=mean, encoder_length=40, decoder_length=40)
    corruption = SpanCorruption.from_config(config, data.vocabulary)
    targets = corruption.example(np.arange(3, 43), np.random.default_rng(0))["decoder"]
    assert len(targets) == noise + spans + 1  # with sentinels and EOS


def texts_and_rows(config: DataConfig, data: TextData) -> tuple[list[tuple[bytes, ...]], list[bytes]]:
    """The uncorrupted texts of each row of an epoch, and the inputs of the rows."""
    one = TextData(replace(config, batch_size=1), data.vocabulary, {"tales": data._documents["tales"]})
    lowest = one.vocabulary.size - one.vocabulary.num_sentinels
    texts, rows = [], []
    for batch in take(one.train_batches(), len(one._rows("tales", "train", config.seed))):
        inputs, targets = batch["encoder_tokens"][0], batch["decoder_targets"][0]
        segments = [(inputs[batch["encoder_segments"][0] == n], targets[batch["decoder_segments"][0] == n])
                    for n in range(1, batch["encoder_segments"].max() + 1)]  # fmt: skip
        texts.append(tuple(restore(*segment, lowest).tobytes() for segment in segments))
        rows.append(inputs.tobytes())
    return texts, rows


def test_the_seed_decides_the_order_of_texts_their_spans_and_which_share_a_row(
    data: TextData, data_config: DataConfig
) -> None:
    alone = [texts_and_rows(replace(data_config, pack=False, seed=seed), data) for seed in (0, 1)]
    assert Counter(alone[0][0]) == Counter(alone[1][0])
    assert alone[0][0] != alone[1][0]
    assert len(set(alone[0][1]) & set(alone[1][1])) < 0.1 * len(alone[0][1])  # short texts have few spans
    packed = [set(map(frozenset, texts_and_rows(replace(data_config, seed=seed), data)[0])) for seed in (0, 1)]
    assert packed[0] != packed[1]


def test_the_seed_decides_the_spans_of_a_text_wherever_it_stands(data: TextData, data_config: DataConfig) -> None:
    tales = data._documents["tales"]
    one = replace(tales["train"], tokens=tales["train"].tokens[:80], offsets=np.array([0, 80]))
    inputs = []
    for seed in (0, 1):
        alone = TextData(replace(data_config, seed=seed), data.vocabulary, {"tales": {**tales, "train": one}})
        inputs.append(next(alone.train_batches())["encoder_tokens"])
    assert not np.array_equal(*inputs)
