"""Small inputs for the tests of this folder."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """Sizes of a routing problem."""

    tokens: int
    experts: int
    selected: int
    capacity: int
    groups: int = 2


CASES = {
    "switch": Case(tokens=12, experts=4, selected=1, capacity=3),
    "top-2": Case(tokens=12, experts=4, selected=2, capacity=5),
    "top-4": Case(tokens=10, experts=8, selected=4, capacity=4),
    "every expert": Case(tokens=6, experts=4, selected=4, capacity=6),
    "capacity 1": Case(tokens=9, experts=3, selected=2, capacity=1),
    "one expert": Case(tokens=5, experts=1, selected=1, capacity=5),
    "fewer tokens than experts": Case(tokens=3, experts=8, selected=2, capacity=2),
    "one token": Case(tokens=1, experts=4, selected=1, capacity=1),
    "one group": Case(tokens=16, experts=4, selected=1, capacity=2, groups=1),
}


@dataclass(frozen=True)
class Choices:
    """The decisions of a router, before capacity."""

    logits: np.ndarray  # [G, S, E]
    expert_index: np.ndarray  # [G, S, K]
    gate: np.ndarray  # [G, S, K]
    token_mask: np.ndarray  # [G, S]


def random_choices(case: Case, seed: int, popularity: float = 1.0, padding: float = 0.3) -> Choices:
    """Choices that prefer the first experts by `popularity`; a share `padding` of the tokens is padding."""
    rng = np.random.default_rng(seed)
    shape = (case.groups, case.tokens, case.experts)
    logits = (rng.normal(size=shape) - popularity * np.arange(case.experts)).astype(np.float32)
    expert_index = np.argsort(-logits, axis=-1)[..., : case.selected].astype(np.int32)
    gate = rng.uniform(0.1, 1.0, size=expert_index.shape).astype(np.float32)
    token_mask = rng.uniform(size=shape[:2]) >= padding
    return Choices(logits, expert_index, gate, token_mask)


def fill_one_by_one(choices: Choices, case: Case) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(group, token, k) -> (expert, position) of every choice with a slot: the papers' rule as a loop.

    First choices of all tokens come first, in the tokens' order; then second ones, and so on.
    """
    placed = {}
    for group in range(case.groups):
        taken = [0] * case.experts
        for k in range(case.selected):
            for token in range(case.tokens):
                expert = int(choices.expert_index[group, token, k])
                if choices.token_mask[group, token] and taken[expert] < case.capacity:
                    placed[group, token, k] = (expert, taken[expert])
                    taken[expert] += 1
    return placed
