"""The section `data`: corpora, vocabulary, objective and batches."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choices, check_not_negative, check_positive, require


@dataclass(frozen=True)
class DataConfig:
    """Corpora, vocabulary, the objective and static batch shapes."""

    objective: Literal["span_corruption", "causal", "classification"] = "span_corruption"
    """span_corruption is for encoder-decoders, causal (the next token) for decoders, classification for images."""
    corpora: tuple[str, ...] = ("c4/en",)
    """Names of the project's own sources, or of TFDS datasets of text or labelled images. A corpus that is not
    available is skipped; a run keeps the corpora that it started with."""
    rates: tuple[float, ...] = ()
    """Sampling rates, one for each corpus; empty: in proportion to the corpora's tokens or images."""
    text_feature: str = "text"
    """The feature with the text of a TFDS dataset; an image dataset has `image` and `label`."""
    directory: str = ""
    """Folder of prepared data; empty: $SWITCHJAX_DATA, or else the user's cache folder."""
    vocabulary: str = ""
    """A SentencePiece model file; empty: a model of `vocabulary_size` pieces is trained on the corpora."""
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
    """If true, several texts share a row, each as a segment."""
    augment: bool = True
    """If true, training images are shifted by up to two pixels and mirrored at random."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices("data", self)
        sizes = ("vocabulary_size", "batch_size", "encoder_length", "decoder_length")
        check_positive("data", {name: getattr(self, name) for name in sizes})
        check_not_negative("data", {"num_sentinels": self.num_sentinels})
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
        """This section with only these corpora, in this order, at their rates."""
        rates = dict(zip(self.corpora, self.rates, strict=False))  # empty if no rates are given
        return dataclasses.replace(self, corpora=corpora, rates=tuple(rates[name] for name in corpora if name in rates))
