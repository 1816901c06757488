"""EleutherAI's harness itself, on the task files of `tasks/`, where the extra `lm-eval` is installed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from switchjax.config import DecodingConfig
from switchjax.inference.pretrained import Pretrained
from switchjax.inference.scoring import perplexity, score
from switchjax.inference.text import complete_tokens
from tests.inference.letters import make_pretrained
from tests.models.families import FAMILIES

# What they import warns, and that is not ours to answer for.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FOLDER = Path(__file__).with_name("tasks")
QUESTIONS = [json.loads(line) for line in (FOLDER / "endings.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def decoder() -> Pretrained:
    return make_pretrained(FAMILIES["glam"])


@pytest.fixture(scope="module")
def evaluate(decoder: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The harness' results for a task file of `tasks/`, its answers beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        import yaml

        from switchjax.inference.harness import HarnessModel

        def run(name: str) -> tuple[dict[str, Any], list[Any]]:
            task = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
            task["dataset_kwargs"] = {"data_files": {"test": str(FOLDER / "endings.jsonl")}}
            found = lm_eval.simple_evaluate(HarnessModel(decoder, length=40), tasks=[task], bootstrap_iters=0)
            return found["results"][task["task"]], found["samples"][task["task"]]

        yield run


def test_multiple_choice_is_scored_as_here(evaluate: Any, decoder: Pretrained) -> None:
    results, samples = evaluate("choice")
    right = 0
    for question, sample in zip(QUESTIONS, samples, strict=True):
        pairs = [(question["question"], f" {ending}") for ending in question["endings"]]
        log_probs = [found.log_prob for found in score(decoder, pairs, length=40)]
        assert [value for ((value, _),) in sample["resps"]] == pytest.approx(log_probs, rel=1e-6)
        right += max(range(len(pairs)), key=log_probs.__getitem__) == question["answer"]
    assert results["acc,none"] == right / len(QUESTIONS)


def test_perplexity_is_that_of_the_texts(evaluate: Any, decoder: Pretrained) -> None:
    results, _ = evaluate("perplexity")
    texts = [question["question"] for question in QUESTIONS]
    expected = 2 ** perplexity(decoder, texts, length=40)["bits_per_byte"]
    assert results["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)


def test_what_is_written_is_what_decoding_writes(evaluate: Any, decoder: Pretrained) -> None:
    _, samples = evaluate("writing")
    ids = [decoder.vocabulary.encode(question["question"])[-36:] for question in QUESTIONS]
    written = complete_tokens(decoder, ids, 36, DecodingConfig(max_new_tokens=4))
    assert [sample["resps"][0][0] for sample in samples] == [text.partition("0")[0] for text in written]
