"""Counting operations in compiled HLO text."""

import re
from collections import Counter

import jax

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")

# `%name = f32[8,16]{1,0} all-to-all(...)`; asynchronous ones come in a pair, of which the start counts.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z0-9-]*)\(", re.MULTILINE)


def count_operations(compiled: jax.stages.Compiled) -> Counter[str]:
    """How often each operation stands in the compiled program, fusions and loop bodies included (each body once)."""
    text = compiled.as_text()
    assert text, "the compiled program has no text"
    return Counter(name.removesuffix("-start") for name in _INSTRUCTION.findall(text))


def count_collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many of each kind of collective the compiled program holds, kinds without any left out."""
    operations = count_operations(compiled)
    return {name: operations[name] for name in COLLECTIVES if operations[name]}
