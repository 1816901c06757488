"""The section `data`: what a run learns from."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choices, check_positive, require


@dataclass(frozen=True)
class DataConfig:
    """Corpora, vocabulary, the objective and static batch shapes."""

    objective: Literal["span_corruption", "causal", "classification"] = "span_corruption"
    """span_corruption is for encoder-decoders, causal (the next token) for decoders, classification for images."""
    corpora: tuple[str, ...] = ("c4/en",)
    """Names of the project's own sources or of any TFDS dataset of text, or of labelled images; one that cannot be had
    is passed over, and a run keeps to those that it was begun with."""
    rates: tuple[float, ...] = ()
    """Sampling rates, one a corpus; empty: in proportion to their tokens, or images."""
    text_feature: str = "text"
    """The feature of a TFDS text dataset that is read; an image dataset has `image` and `label`."""
    directory: str = ""
    """Where prepared data lives; empty: $SWITCHJAX_DATA, or else the user's cache folder."""
    vocabulary: str = ""
    """A SentencePiece model file; empty: one of `vocabulary_size` pieces is trained on the corpora."""
    vocabulary_size: int = 2000
    num_sentinels: int = 48
    """Ids above the vocabulary's pieces, for span_corruption."""
    batch_size: int = 128
    """Rows of a global batch."""
    encoder_length: int = 512
    decoder_length: int = 114
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    pack: bool = True
    """Several texts share a row, each a segment of it."""
    augment: bool = True
    """Training images are shifted by up to two pixels and mirrored at random."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices("data", self)
        sizes = ("vocabulary_size", "batch_size", "encoder_length", "decoder_length")
        check_positive("data", {name: getattr(self, name) for name in sizes})
        require(self.num_sentinels >= 0, f"data.num_sentinels must not be negative, got {self.num_sentinels}")
        require(len(self.corpora) > 0, "data.corpora must name at least one corpus")
        require(len(set(self.corpora)) == len(self.corpora), f"data.corpora names a corpus twice: {self.corpora}")
        require(0 < self.noise_density < 1, f"data.noise_density must be in (0, 1), got {self.noise_density}")
        require(self.mean_span_length >= 1, f"data.mean_span_length must be at least 1, got {self.mean_span_length}")
        require(
            len(self.rates) in (0, len(self.corpora)),
            f"data.rates has {len(self.rates)} values for {len(self.corpora)} corpora",
        )
        check_positive("data", {f"rates[{i}]": rate for i, rate in enumerate(self.rates)})

    def only(self, corpora: tuple[str, ...]) -> "DataConfig":
        """With some of its corpora alone, in this order, at their rates."""
        rates = dict(zip(self.corpora, self.rates, strict=False))  # of none where they are not given
        return dataclasses.replace(self, corpora=corpora, rates=tuple(rates[name] for name in corpora if name in rates))
