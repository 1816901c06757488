"""Parses compiled HLO text into computations and instructions, and counts how often each runs in a step.

XLA prints a program as computations of instructions, `%name = shape opcode(%operand, ...), attribute=value, ...`. One
computation is the entry; instructions call the others, and a loop calls its body in every iteration.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import NamedTuple

import jax

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
# The lazy shape ends at the first ` word(`: layouts such as `{1,0:T(8,128)}` have no space before a parenthesis.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation|async_wrapped)=%?([\w.-]+)")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Shape(NamedTuple):
    """An array: HLO's name of its element type, its sizes, and whether a device's main memory holds it."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Its bytes without the padding of the layout."""
        return math.ceil(self.elements * _bits(self.dtype) / 8)

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.in_hbm else 0


def _bits(dtype: str) -> int:
    """Bits of an element: the first digits of its type (`bf16`, `f8e4m3fn`, `s4`)."""
    digits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape_text: str
    operands: tuple[str, ...]
    attributes: str
    """Everything after the operands: attributes, metadata, backend_config."""
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The resulting array, or the arrays of a tuple in order."""
        return parse_shapes(self.shape_text)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def hbm_bytes(self) -> int:
        return sum(shape.hbm_bytes for shape in self.shapes)

    @property
    def source(self) -> str:
        """Its origin in the JAX program (`metadata.op_name`)."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The text inside the braces of `name={...}`, or an empty string."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.attributes)
        return found[1] if found else ""


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape such as `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`; `S(n)` is a memory on the chip."""
    return tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


Computation = dict[str, Instruction]
"""Instructions by name, in order."""


@dataclass(frozen=True)
class Program:
    """A parsed HLO module."""

    computations: dict[str, Computation]
    entry: str

    @cached_property
    def executions(self) -> Counter[str]:
        """Computation -> number of runs when the program runs once.

        A loop's body counts once for each iteration (once if their number is unknown). Each branch of a conditional
        counts as taken.
        """
        calls = {name: list(self._calls(computation)) for name, computation in self.computations.items()}
        callees_first = TopologicalSorter({name: [called for called, _ in called] for name, called in calls.items()})
        executions = Counter({self.entry: 1})
        for name in reversed(list(callees_first.static_order())):
            for called, times in calls[name]:
                executions[called] += executions[name] * times
        return executions

    def instructions(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, with its computation and its number of runs."""
        for name, computation in self.computations.items():
            if times := self.executions[name]:
                for instruction in computation.values():
                    yield computation, instruction, times

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a `while`: the compiler's count, or the constant in its condition, or 1 if both are missing.

        The constant is the count because JAX's loops over a range start at 0 and step by 1.
        """
        if found := _TRIP_COUNT.search(loop.attributes):
            return int(found[1])
        condition = self.computations[called_computations(loop)[1]]
        limits = [c for c in condition.values() if c.opcode == "constant" and c.shapes[0].dtype in ("s32", "u32")]
        return int(limits[0].operands[0]) if len(limits) == 1 and limits[0].operands else 1

    def _calls(self, computation: Computation) -> Iterator[tuple[str, int]]:
        for instruction in computation.values():
            times = self.trip_count(instruction) if instruction.opcode == "while" else 1
            for i, name in enumerate(called_computations(instruction)):
                yield name, times + i if instruction.opcode == "while" else 1


def called_computations(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction calls; a loop's body comes before its condition."""
    text = instruction.attributes
    if instruction.opcode == "while":
        return [match[1] for role in ("body", "condition") if (match := re.search(rf"\b{role}=%?([\w.-]+)", text))]
    if instruction.opcode.endswith(("-done", "-update")):  # the matching `-start` makes the call
        return []
    branches = _BRANCHES.search(text)
    return _CALLED.findall(text) + (re.findall(r"[\w.-]+", branches[1]) if branches else [])


def parse(text: str) -> Program:
    """Parses the text of `compiled.as_text()`; raises a `ValueError` if it has no entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            operands, _, attributes = _COMMENT.sub("", rest).partition(")")
            names = tuple(re.findall(r"[^\s,%]+", operands))
            current[name] = Instruction(name, opcode, shape, names, attributes, bool(root))
    if not entry:
        raise ValueError("the text holds no HLO module with an entry computation")
    return Program(computations, entry)


def parse_compiled(compiled: jax.stages.Compiled) -> Program:
    """Parses a compiled program."""
    text = compiled.as_text()
    assert text, "the compiled program has no text"
    return parse(text)


def count_operations(compiled: jax.stages.Compiled) -> Counter[str]:
    """Operation -> number of its instructions in the compiled program, including fusions and loop bodies."""
    program = parse_compiled(compiled)
    return Counter(
        instruction.opcode.removesuffix("-start")
        for computation in program.computations.values()
        for instruction in computation.values()
    )
