"""Which layers of transformers' Switch Transformers have experts, and the pattern that says so here."""

import math
from collections.abc import Sequence

from switchjax.config import UserError


def sparse_kinds(num_layers: int, step: int) -> tuple[str, ...]:
    """The kinds of a stack's layers: every `step`-th has experts, from the second on; all if `step` is 1.

    `num_sparse_*_layers=0` makes transformers set the step to the number of layers, and then the second layer has
    experts all the same.
    """
    return tuple("moe" if step == 1 or (step > 0 and i % step == 1) else "dense" for i in range(num_layers))


def find_pattern(stacks: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest pattern that every one of the stacks repeats.

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
    """The step of which `sparse_kinds` makes these.

    Raises:
        UserError: if there is none.
    """
    for step in range(1, len(kinds) + 1):
        if sparse_kinds(len(kinds), step) == kinds:
            return step
    raise UserError(f"SwitchTransformersForConditionalGeneration has no stack of layers {', '.join(kinds)}")
