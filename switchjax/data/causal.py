"""Next-token prediction, for decoder-only models."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Integer

from switchjax.config import DataConfig
from switchjax.data.objective import Objective, TokenIds
from switchjax.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Causal(Objective):
    """Predicts each token of a document, and finally its EOS, from the tokens before it in the same chunk.

    Only a document's last chunk has an EOS, so a model never learns to stop in the middle of a text.

    Attributes:
        decoder_length: tokens in a row.
    """

    min_tokens: ClassVar[int] = 1
    ends_documents: ClassVar[bool] = True

    decoder_length: int

    @classmethod
    def from_config(cls, config: DataConfig, vocabulary: Vocabulary) -> "Causal":
        """See `Objective`; any vocabulary works."""
        del vocabulary
        return cls(config.decoder_length)

    @property
    def row_lengths(self) -> dict[str, int]:
        """The decoder's row length; there is no encoder."""
        return {"decoder": self.decoder_length}

    def lengths(self, num_tokens: Integer[np.ndarray, "chunks"]) -> Integer[np.ndarray, "1 chunks"]:
        """One target for each token."""
        return num_tokens[None]

    def example(self, tokens: TokenIds, rng: np.random.Generator) -> dict[str, TokenIds]:
        """Returns the chunk itself; nothing is random."""
        del rng
        return {"decoder": tokens}
