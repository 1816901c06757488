"""What a text model learns from: the seam between text and the arrays of a batch."""

import abc
from typing import ClassVar

import numpy as np
from jaxtyping import Integer

from switchjax.config import DataConfig, UserError
from switchjax.data.vocabulary import Vocabulary

Tokens = Integer[np.ndarray, "_"]
"""Ids of a text."""


class Objective(abc.ABC):
    """Turns a chunk of a document into what each stack of a model reads or predicts.

    Packing and rows know of an objective only what is here.

    Attributes:
        min_tokens: length of the shortest chunk of any use.
        ends_documents: whether a document's last chunk ends with an EOS of the document's own.
    """

    min_tokens: ClassVar[int]
    ends_documents: ClassVar[bool]

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: DataConfig, vocabulary: Vocabulary) -> "Objective":
        """The objective that `config` describes.

        Raises:
            UserError: if the config contradicts itself or the vocabulary.
        """

    @property
    @abc.abstractmethod
    def row_lengths(self) -> dict[str, int]:
        """Stack (`encoder`, `decoder`) -> tokens of a row; a stack that the objective does not feed is absent."""

    @abc.abstractmethod
    def lengths(self, num_tokens: Integer[np.ndarray, "chunks"]) -> Integer[np.ndarray, "stacks chunks"]:
        """What chunks of these lengths occupy of a row, in the order of `row_lengths`."""

    @abc.abstractmethod
    def example(self, tokens: Tokens, rng: np.random.Generator) -> dict[str, Tokens]:
        """Stack -> the inputs of the encoder, the targets of the decoder.

        Args:
            tokens: a chunk of at least `min_tokens`.
            rng: draws what is random about it.
        """

    @property
    def max_tokens(self) -> int:
        """The longest chunk that fits into a row.

        Raises:
            UserError: if not even the shortest one fits.
        """
        rooms = np.array(list(self.row_lengths.values()))
        candidates = np.arange(self.min_tokens, max(rooms.sum(), self.min_tokens) + 1)
        needed = self.lengths(candidates)
        fitting = candidates[(needed <= rooms[:, None]).all(0)]
        if not len(fitting):
            settings = " and ".join(f"data.{stack}_length={room}" for stack, room in self.row_lengths.items())
            raise UserError(f"too short for any text: {settings}; at least {' and '.join(map(str, needed[:, 0]))}")
        return int(fitting[-1])
