"""How a model writes: no section of a run's config, since nothing of the training depends on it."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choices, check_positive, require


@dataclass(frozen=True)
class DecodingConfig:
    """How the next token is chosen, and how many there may be."""

    method: Literal["greedy", "sample", "beam"] = "greedy"
    """greedy (the most probable token), sample (drawn at random) or beam (beam search)."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    """sample: the logits are divided by it."""
    top_k: int = 0
    """sample: only the so many most probable tokens (Fan et al. 2018); 0: all."""
    top_p: float = 1.0
    """sample: only the most probable tokens that together have this probability (Holtzman et al. 2020)."""
    num_beams: int = 4
    length_penalty: float = 0.6
    """beam: alpha of `log P / ((5 + tokens) / 6)^alpha` (Wu et al. 2016, eq. 14); 0: no penalty for being short."""

    def __post_init__(self) -> None:
        check_choices("decoding", self)
        sizes = ("max_new_tokens", "temperature", "num_beams")
        check_positive("decoding", {name: getattr(self, name) for name in sizes})
        require(self.top_k >= 0, f"decoding.top_k must not be negative, got {self.top_k}")
        require(0 < self.top_p <= 1, f"decoding.top_p must be in (0, 1], got {self.top_p}")
        require(self.length_penalty >= 0, f"decoding.length_penalty must not be negative, got {self.length_penalty}")
