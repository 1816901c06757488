"""A vocabulary of letters, and models with random weights that read it."""

from collections.abc import Sequence
from typing import Any

from switchjax.config import Config
from switchjax.data.vocabulary import EOS, PAD, Vocabulary
from switchjax.inference.pretrained import Pretrained, dropless
from tests.models.families import make_model

_LETTERS = "abcdefghijklmnopqrstuvwxyz <>_0123456789"


class Letters(Vocabulary):
    """One id a letter, from 3 on; `<extra_id_k>` is a sentinel."""

    def __init__(self) -> None:
        """Without a model."""
        self.num_sentinels, self.size = 2, 3 + len(_LETTERS) + 2

    def _encode_run(self, text: str, first: bool) -> list[int]:
        return [3 + _LETTERS.index(letter) for letter in text]

    def decode(self, ids: Sequence[int] | Any) -> str:
        text = ""
        for i in ids:
            if i == EOS:
                break
            if i >= self.size - self.num_sentinels:
                text += f"<extra_id_{self.size - 1 - i}>"
            elif i > 2:
                text += _LETTERS[i - 3]
        return text


def make_pretrained(config: Config) -> Pretrained:
    """A model of `config` that drops no token, with random weights."""
    config = dropless(config)
    return Pretrained(config, make_model(config), Letters())


assert PAD < EOS < 3
