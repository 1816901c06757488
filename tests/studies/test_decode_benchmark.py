"""Both ways of decoding write the same text, and each batch size has a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.accounting.matmuls import matmuls
from switchjax.config import Config, DecodingConfig
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless
from switchjax.studies import decode_benchmark
from switchjax.studies.decode_benchmark import DecodeRow, decode_uncached, make_prompts, matmuls_alone
from switchjax.studies.timing import Ratio
from tests.accounting.test_matmuls import program
from tests.models import examples
from tests.models.families import FAMILIES, make_model
from tests.studies.written import check_written, measure


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

    (row,) = measure(decode_benchmark, ["--config", "tiny", "--new_tokens=4", "--repeats=1"], {"tiny": config})
    assert (row.model, row.rows, row.new_tokens) == ("tiny", 2, 4)
    assert row.speedup.median == pytest.approx(row.cached_tokens_per_second / row.uncached_tokens_per_second)


def test_rows_become_the_documents_table() -> None:
    row = DecodeRow("tiny", 8, 1234.5, 12.3, Ratio(100.0, 99.0, 101.0), Ratio(1.5, 1.4, 1.6), 256)
    ((line,),) = check_written([row], "docs/decoding.md")
    assert line == "| tiny | 8 | 1234 | 12 | 100.00 (99.00 to 101.00) | 1.50 (1.40 to 1.60) |"


def test_all_products_are_computed_again_each_time() -> None:
    found = matmuls(program, {"layers": jnp.ones((5, 4, 4)), "head": jnp.ones((4, 7))}, jnp.ones((3, 4)))
    alone = matmuls_alone(found, repeats=6)
    assert float(alone()) == 1.0
    text = jax.jit(alone).lower().compile().as_text()
    assert text.count(" dot(") == 2
    assert '"known_trip_count":{"n":"6"}' in text
    assert '"known_trip_count":{"n":"5"}' in text
