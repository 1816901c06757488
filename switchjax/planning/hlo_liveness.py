"""What a compiled program holds when it holds most: which arrays a device's temporaries are.

The compiler tells only their sum. Its text is in the order of execution, so arrays live from the line that makes them
to the last that uses them; what it does to share and align memory is not seen, and the sum comes out somewhat smaller.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from switchjax.planning.hlo import Computation, Instruction, Program, Shape
from switchjax.planning.hlo_memory import destination, element_index, fusion_roots

_SAME_MEMORY = frozenset({"bitcast", "while", "opt-barrier", "dynamic-update-slice"})
"""Return what their first operand holds, changed in place."""


@dataclass(frozen=True)
class Held:
    """Arrays of one shape and origin that are held at the same time."""

    bytes: int
    """Of all of them, on one device."""
    count: int
    shape: str
    source: str
    """`op_name` of what makes them; of the shape of a parameter, that parameter's name."""


@dataclass
class _Buffer:
    """An array in memory."""

    shape: Shape
    source: str
    born: int
    """Position of the instruction that makes it."""
    died: int
    """Of the last that uses it."""
    given: bool = False
    """An argument, or a result that takes an argument's place: not a temporary."""


@dataclass
class _Memory:
    """The entry computation's arrays, as instructions come by in order."""

    program: Program
    entry: Computation
    buffers: list[_Buffer] = field(default_factory=list)
    values: dict[str, list[_Buffer]] = field(default_factory=dict)
    """Of each instruction, the buffers of its result, one an array."""

    def step(self, position: int, instruction: Instruction) -> None:
        """Takes the next instruction."""
        operands = [self.values.get(name, []) for name in instruction.operands]
        for buffer in (buffer for operand in operands for buffer in operand):
            buffer.died = position
        self.values[instruction.name] = self._result(position, instruction, operands)

    def _result(self, position: int, instruction: Instruction, operands: list[list[_Buffer]]) -> list[_Buffer]:
        opcode = instruction.opcode
        if opcode == "tuple":
            return [buffer for operand in operands for buffer in operand]
        if opcode == "get-tuple-element":
            return operands[0][element_index(instruction) :][:1]
        if opcode in _SAME_MEMORY or opcode.endswith(("-done", "-update")):
            return operands[0]
        if opcode.endswith("-start"):
            return [self._new(position, instruction, destination(instruction))]
        if opcode == "fusion":
            return self._fused(position, instruction, operands)
        return [self._new(position, instruction, shape) for shape in instruction.shapes]

    def _fused(self, position: int, fusion: Instruction, operands: list[list[_Buffer]]) -> list[_Buffer]:
        """New arrays, but for those that the fusion updates in place."""
        results = []
        for (_, root), shape in zip(fusion_roots(self.program, fusion), fusion.shapes, strict=True):
            same = [operand[0] for operand in operands if operand and operand[0].shape.sizes == shape.sizes]
            in_place = root.opcode == "dynamic-update-slice" and bool(same)
            results.append(same[0] if in_place else self._new(position, fusion, shape))
        return results

    def _new(self, position: int, instruction: Instruction, shape: Shape) -> _Buffer:
        given = instruction.opcode == "parameter"
        buffer = _Buffer(shape, instruction.source, position, position, given)
        self.buffers.append(buffer)
        return buffer


def held_at_peak(program: Program) -> list[Held]:
    """The temporaries of the moment at which they take most of a device's memory, largest first.

    Loops count as what they carry: the arrays inside their bodies, which live for one turn, are left out.
    """
    entry = program.computations[program.entry]
    memory = _Memory(program, entry)
    for position, instruction in enumerate(entry.values()):
        memory.step(position, instruction)
    root = next(instruction for instruction in entry.values() if instruction.is_root)
    for buffer in memory.values[root.name]:
        buffer.given = True
    temporaries = [buffer for buffer in memory.buffers if not buffer.given and buffer.shape.hbm_bytes]
    peak = _peak(temporaries)
    held = [buffer for buffer in temporaries if buffer.born <= peak <= buffer.died]
    return _grouped(held, _parameter_names(entry))


def _peak(buffers: list[_Buffer]) -> int:
    changes: dict[int, int] = defaultdict(int)
    for buffer in buffers:
        changes[buffer.born] += buffer.shape.hbm_bytes
        changes[buffer.died + 1] -= buffer.shape.hbm_bytes
    most = total = peak = 0
    for position in sorted(changes):
        total += changes[position]
        if total > most:
            most, peak = total, position
    return peak


def _parameter_names(entry: Computation) -> dict[tuple[int, ...], str]:
    """Sizes -> the first parameter of these, as the JAX program calls it."""
    names: dict[tuple[int, ...], str] = {}
    for instruction in entry.values():
        if instruction.opcode == "parameter" and instruction.source.startswith("state.model"):
            name = instruction.source.removeprefix("state.model.").removesuffix(".value")
            names.setdefault(instruction.shapes[0].sizes, name)
    return names


def _grouped(buffers: list[_Buffer], names: dict[tuple[int, ...], str]) -> list[Held]:
    counts: Counter[tuple[Shape, str]] = Counter()
    for buffer in buffers:
        sizes = buffer.shape.sizes
        source = f"as {names[sizes]}" if len(sizes) > 1 and sizes in names else buffer.source
        counts[(buffer.shape, source)] += 1
    held = [
        Held(count * shape.bytes, count, f"{shape.dtype}[{','.join(map(str, shape.sizes))}]", source)
        for (shape, source), count in counts.items()
    ]
    return sorted(held, key=lambda one: -one.bytes)
