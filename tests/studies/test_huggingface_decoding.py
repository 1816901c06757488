"""Decoding beside transformers: the same text where it is installed, and what is said where it is not."""

import sys

import pytest

from switchjax.config import UserError
from switchjax.studies import huggingface_decoding
from switchjax.studies.huggingface_decoding import benchmark_beside_transformers
from tests.interop.examples import FIXTURES


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install torch transformers"):
        benchmark_beside_transformers([FIXTURES / "mixtral"], 4, 1, print)


@pytest.mark.parametrize("name", ["mixtral", "t5_v1_1"])
def test_both_write_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(huggingface_decoding, "ROWS", (2,))
    table = benchmark_beside_transformers([FIXTURES / name], 6, 1, print)
    assert table.splitlines()[-1].endswith("| 100 % |")
