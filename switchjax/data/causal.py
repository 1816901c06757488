"""Next-token prediction, for decoder-only models."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Integer

from switchjax.config import DataConfig
from switchjax.data.objective import Objective, Tokens
from switchjax.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Causal(Objective):
    """Every token of a document, and then its EOS, is predicted from those before it in the same chunk.

    A chunk that does not end its document has no EOS, so that a model never learns to stop in the middle of a text.

    Attributes:
        decoder_length: tokens of a row.
    """

    min_tokens: ClassVar[int] = 1
    ends_documents: ClassVar[bool] = True

    decoder_length: int

    @classmethod
    def from_config(cls, config: DataConfig, vocabulary: Vocabulary) -> "Causal":
        """See `Objective`; every vocabulary will do."""
        del vocabulary
        return cls(config.decoder_length)

    @property
    def row_lengths(self) -> dict[str, int]:
        """Of the decoder only."""
        return {"decoder": self.decoder_length}

    def lengths(self, num_tokens: Integer[np.ndarray, "chunks"]) -> Integer[np.ndarray, "1 chunks"]:
        """A target a token."""
        return num_tokens[None]

    def example(self, tokens: Tokens, rng: np.random.Generator) -> dict[str, Tokens]:
        """The chunk itself; nothing is random."""
        del rng
        return {"decoder": tokens}
