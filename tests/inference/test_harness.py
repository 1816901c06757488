"""The harness' adapter, with a stand-in for lm-eval's base class: it is tested where lm-eval is not installed, too."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from switchjax.config import DecodingConfig, UserError
from switchjax.inference.pretrained import Pretrained
from switchjax.inference.scoring import log_likelihoods, score
from switchjax.inference.text import complete_tokens
from tests.inference.letters import make_pretrained
from tests.models import examples
from tests.models.families import FAMILIES

MODULES = ("lm_eval", "lm_eval.api", "lm_eval.api.model")


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
        patch.delitem(sys.modules, "switchjax.inference.harness", raising=False)
        yield importlib.import_module("switchjax.inference.harness")
    sys.modules.pop("switchjax.inference.harness", None)


@pytest.fixture(scope="module")
def decoder() -> Pretrained:
    return make_pretrained(FAMILIES["glam"])


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=values) for values in arguments]


def test_likelihoods_are_the_scores(harness: Any, decoder: Pretrained) -> None:
    model = harness.HarnessModel(decoder, rows=2)
    pairs = [("abc", "de"), ("", "ab"), ("c", "a")]
    assert model.loglikelihood(requests(*pairs)) == [(s.log_prob, s.is_greedy) for s in score(decoder, pairs, rows=2)]
    texts = ["abcde", "abcdefghijklmno"]
    expected = [s.log_prob for s in log_likelihoods(decoder, texts, rows=2)]
    assert model.loglikelihood_rolling(requests(*((text,) for text in texts))) == expected


def test_it_writes_until_a_stop_and_mixes_up_no_answers(harness: Any, decoder: Pretrained) -> None:
    model = harness.HarnessModel(decoder, rows=2)
    contexts = ["abc", "de", "e", "abcdefghijklm"]
    few, many = DecodingConfig(max_new_tokens=4), DecodingConfig(max_new_tokens=6)
    # A row of 12 tokens has room for 8 of the context and 4 new ones.
    ids = [decoder.vocabulary.encode(context)[-8:] for context in contexts]
    whole = [text for half in (ids[:2], ids[2:]) for text in complete_tokens(decoder, half, 8, few)]
    longer, _ = complete_tokens(decoder, ids[:2], 6, many)
    stop = whole[1][2]
    asked = [(context, {"until": [stop, ""], "max_gen_toks": 4}) for context in contexts]
    answers = model.generate_until(requests(asked[0], ("abc", {"max_gen_toks": 6, "until": None}), *asked[1:]))
    assert answers[1] == longer
    del answers[1]
    assert answers == [text.partition(stop)[0] for text in whole]


def test_the_arguments_of_a_request_say_how_it_is_decoded(harness: Any) -> None:
    config = harness.decoding_config
    assert config({"until": ["."]}) == DecodingConfig(max_new_tokens=256)
    assert config({"do_sample": False, "temperature": 0.0, "max_gen_toks": 9}) == DecodingConfig(max_new_tokens=9)
    sampled = DecodingConfig("sample", 256, temperature=0.7, top_p=0.9)
    assert config({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == sampled
    with pytest.raises(UserError, match="a task of the harness asks for num_beams, which decoding does not support"):
        config({"num_beams": 3})


def test_what_it_cannot_do_is_refused(harness: Any, decoder: Pretrained) -> None:
    with pytest.raises(UserError, match="the harness needs a decoder, but this run has model"):
        harness.HarnessModel(make_pretrained(examples.TINY))
    with pytest.raises(UserError, match="rows of 12 tokens leave no room for 12 new ones"):
        harness.HarnessModel(decoder).generate_until(requests(("a", {"max_gen_toks": 12})))


def test_without_lm_eval_it_says_what_to_install() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        patch.setitem(sys.modules, "lm_eval.api.model", None)
        patch.delitem(sys.modules, "switchjax.inference.harness", raising=False)
        with pytest.raises(UserError, match="the harness needs lm-eval: pip install"):
            importlib.import_module("switchjax.inference.harness")
