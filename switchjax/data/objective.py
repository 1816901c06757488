"""The interface of text objectives: what a model reads and predicts, given a chunk of a document."""

import abc
from typing import ClassVar

import numpy as np
from jaxtyping import Integer

from switchjax.config import DataConfig, UserError
from switchjax.data.vocabulary import Vocabulary

TokenIds = Integer[np.ndarray, "_"]
"""Ids of a text."""


class Objective(abc.ABC):
    """Turns a chunk of a document into what each stack of a model reads or predicts.

    Packing and rows use only this interface.

    Attributes:
        min_tokens: length of the shortest usable chunk.
        ends_documents: whether each document's last chunk ends with an EOS.
    """

    min_tokens: ClassVar[int]
    ends_documents: ClassVar[bool]

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: DataConfig, vocabulary: Vocabulary) -> "Objective":
        """The objective that `config` describes.

        Raises:
            UserError: if the config contradicts itself or does not fit the vocabulary.
        """

    @property
    @abc.abstractmethod
    def row_lengths(self) -> dict[str, int]:
        """Tokens in a row of each stack (`encoder`, `decoder`) that the objective feeds."""

    @abc.abstractmethod
    def lengths(self, num_tokens: Integer[np.ndarray, "chunks"]) -> Integer[np.ndarray, "stacks chunks"]:
        """The tokens that chunks of these lengths occupy in a row, in the order of `row_lengths`."""

    @abc.abstractmethod
    def example(self, tokens: TokenIds, rng: np.random.Generator) -> dict[str, TokenIds]:
        """The inputs of the encoder and the targets of the decoder, by stack.

        Args:
            tokens: a chunk of at least `min_tokens`.
            rng: source of all randomness.
        """

    @property
    def max_tokens(self) -> int:
        """Length of the longest chunk that fits into a row.

        Raises:
            UserError: if even the shortest chunk does not fit.
        """
        rooms = np.array(list(self.row_lengths.values()))
        candidates = np.arange(self.min_tokens, max(rooms.sum(), self.min_tokens) + 1)
        needed = self.lengths(candidates)
        fitting = candidates[(needed <= rooms[:, None]).all(0)]
        if not len(fitting):
            settings = " and ".join(f"data.{stack}_length={room}" for stack, room in self.row_lengths.items())
            least = " and ".join(map(str, needed[:, 0]))
            raise UserError(f"rows are too short for any text: {settings}; they need at least {least}")
        return int(fitting[-1])
