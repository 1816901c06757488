"""Both ways of decoding write the same, and the benchmark's table has a row for each number of texts."""

import numpy as np
import pytest

from switchjax.config import Config, DecodingConfig
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless
from switchjax.studies import decode_benchmark
from switchjax.studies.decode_benchmark import benchmark_decoding, decode_uncached, make_prompts
from tests.models import examples
from tests.models.families import FAMILIES, make_model


@pytest.mark.parametrize(
    "config", [FAMILIES["glam"], pytest.param(examples.changed(jitter_noise=0.0), marks=pytest.mark.slow)]
)
def test_what_is_timed_is_the_same_text(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_benchmark, "PROMPT_TOKENS", 5)
    monkeypatch.setattr(decode_benchmark, "ROWS", (2,))
    model = make_model(dropless(config))
    prompts = make_prompts(config.model.family == "encoder_decoder", 2, 48)
    cached = generate(model, prompts, DecodingConfig(max_new_tokens=4), 48, eos=-1)
    np.testing.assert_array_equal(cached, decode_uncached(model, prompts, 4, 48))
    reported: list[str] = []
    table = benchmark_decoding([("tiny", lambda: model)], 4, repeats=1, report=reported.append)
    assert table.splitlines()[2:] == reported
    assert reported[0].startswith("| tiny | 2 | ")
