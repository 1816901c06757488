"""The settings of decoding; they are no section of a run's config, because training does not depend on them."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choices, check_not_negative, check_positive, require


@dataclass(frozen=True)
class DecodingConfig:
    """The method that chooses the next token, and limits."""

    method: Literal["greedy", "sample", "beam"] = "greedy"
    """greedy (the most probable token), sample (drawn at random) or beam (beam search)."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    """sample: divisor of the logits."""
    top_k: int = 0
    """sample: number of most probable tokens to draw from (Fan et al. 2018); 0: all."""
    top_p: float = 1.0
    """sample: draw from the most probable tokens that together have this probability (Holtzman et al. 2020)."""
    num_beams: int = 4
    length_penalty: float = 0.6
    """beam: alpha of `log P / ((5 + tokens) / 6)^alpha` (Wu et al. 2016, eq. 14); 0: no penalty."""

    def __post_init__(self) -> None:
        check_choices("decoding", self)
        sizes = ("max_new_tokens", "temperature", "num_beams")
        check_positive("decoding", {name: getattr(self, name) for name in sizes})
        check_not_negative("decoding", {"top_k": self.top_k, "length_penalty": self.length_penalty})
        require(0 < self.top_p <= 1, f"decoding.top_p must be in (0, 1], got {self.top_p}")
