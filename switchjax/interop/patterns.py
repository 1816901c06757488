"""Translates between transformers' sparse step and our pattern of dense layers and layers with experts."""

import math
from collections.abc import Sequence

from switchjax.config import UserError


def sparse_kinds(num_layers: int, step: int) -> tuple[str, ...]:
    """The kinds of a stack's layers: the second and then every `step`-th have experts; all have them if `step` is 1.

    With `num_sparse_*_layers=0`, transformers sets the step to the number of layers, so the second layer has experts
    even then.
    """
    return tuple("moe" if step == 1 or (step > 0 and i % step == 1) else "dense" for i in range(num_layers))


def find_pattern(stacks: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest pattern that each of the stacks repeats.

    Raises:
        UserError: if there is none.
    """
    for length in range(1, math.gcd(*map(len, stacks)) + 1):
        pattern = stacks[0][:length]
        if all(pattern * (len(kinds) // length) == kinds for kinds in stacks):
            return pattern
    shown = " and ".join("".join(kind[0] for kind in kinds) for kinds in stacks)
    raise UserError(f"no one model.pattern gives the (d)ense and (m)oe layers of both stacks: {shown}")


def sparse_step(kinds: tuple[str, ...]) -> int:
    """The step for which `sparse_kinds` returns `kinds`.

    Raises:
        UserError: if there is none.
    """
    for step in range(1, len(kinds) + 1):
        if sparse_kinds(len(kinds), step) == kinds:
            return step
    raise UserError(f"SwitchTransformersForConditionalGeneration does not support the layers {', '.join(kinds)}")
