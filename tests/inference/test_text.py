"""Texts on their way to the model and back."""

import pytest

from switchjax.config import DecodingConfig, UserError
from switchjax.inference.pretrained import Pretrained
from switchjax.inference.text import _insert, complete, fill_in
from tests.inference.letters import make_pretrained
from tests.models import examples
from tests.models.families import FAMILIES

DECODING = DecodingConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def decoder() -> Pretrained:
    return make_pretrained(FAMILIES["glam"])


@pytest.fixture(scope="module")
def encoder_decoder() -> Pretrained:
    return make_pretrained(examples.changed(jitter_noise=0.0, expert_dropout=0.0))


def test_a_prompt_is_continued_whatever_the_others_are(decoder: Pretrained) -> None:
    prompts = ["abcde", "e", "", "abc abc"]
    together = complete(decoder, prompts, DECODING)
    assert len({len(text) for text in together} | set(together)) > 2, "all the same"
    for prompt, text in zip(prompts, together, strict=True):
        assert complete(decoder, [prompt, "abc abc", "", ""], DECODING)[0] == text


def test_passages_are_filled_in_whatever_the_others_are(encoder_decoder: Pretrained) -> None:
    passages = ["ab <extra_id_0> c", "<extra_id_1>ab"]
    together = fill_in(encoder_decoder, passages, DECODING)
    assert [text.partition("[")[0] for text in together] == ["ab ", ""]
    assert fill_in(encoder_decoder, passages[::-1], DECODING) == together[::-1]


def test_the_answer_goes_back_into_the_passage() -> None:
    answer = "<extra_id_0> beginning <extra_id_1> heaven and the earth <extra_id_2> <extra_id_0> end"
    passage = "In the <extra_id_0> God created the <extra_id_1>. And <extra_id_3>"
    assert _insert(passage, answer) == "In the [beginning] God created the [heaven and the earth]. And []"


@pytest.mark.parametrize(
    ("passage", "message"),
    [("no mask", "nothing to fill in"), ("<extra_id_0>" + "a" * 16, "longer than data.encoder_length=16")],
)
def test_passages_that_cannot_be_filled_in_are_refused(encoder_decoder: Pretrained, passage: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill_in(encoder_decoder, [passage], DECODING)


def test_each_family_has_its_way_of_prompting(decoder: Pretrained, encoder_decoder: Pretrained) -> None:
    with pytest.raises(UserError, match="filling in spans needs an encoder-decoder"):
        fill_in(decoder, ["<extra_id_0>"], DECODING)
    with pytest.raises(UserError, match="an encoder-decoder fills in spans"):
        complete(encoder_decoder, ["a"], DECODING)
