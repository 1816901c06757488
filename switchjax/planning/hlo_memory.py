"""What a compiled program reads and writes in a device's memory, and what it keeps for the backward pass."""

import re
from collections.abc import Iterator

from switchjax.planning.hlo import Computation, Instruction, Program, Shape, called_computations

# Names for what lies in memory already, or for control flow whose own instructions are counted.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"})
_FREE |= {"while", "conditional", "call", "partition-id", "replica-id"}
_SLICES = ("dynamic-slice", "slice", "gather")
"""Read only as much of their first operand as they return."""
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Write only as much as their operand of this position holds, in place."""
_KERNEL = "tpu_custom_call"
"""The custom call that computes; all others of the TPU compiler are marks."""


def memory_traffic(program: Program) -> int:
    """Bytes that a step reads from and writes to one device's HBM, loops included.

    Each instruction outside of fusions reads its operands and writes its results, but for arrays that the compiler has
    placed on the chip (memory space `S(1)`). Of what is only sliced or updated in place, the slice alone counts.
    """
    inner = {
        name
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode not in ("while", "conditional", "call", "async-start")
        for name in called_computations(instruction)
    }
    return sum(
        times * _instruction_traffic(program, computation, instruction)
        for name, computation in program.computations.items()
        if name not in inner and (times := program.executions[name])
        for instruction in computation.values()
    )


def _instruction_traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and _KERNEL not in instruction.attributes:
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    reads = sum(
        min(operand.hbm_bytes, _read_of_operand(program, instruction, position))
        for position, operand in enumerate(operands)
    )
    return reads + _writes(program, instruction, operands)


def _writes(program: Program, instruction: Instruction, operands: list[Instruction]) -> int:
    if instruction.opcode == "fusion":
        roots = fusion_roots(program, instruction)
        return sum(
            min(shape.bytes, _written_by_root(*root))
            for root, shape in zip(roots, instruction.shapes, strict=True)
            if shape.in_hbm
        )
    if instruction.opcode in _UPDATES:
        return operands[_UPDATES[instruction.opcode]].bytes if instruction.shapes[0].in_hbm else 0
    if instruction.opcode.endswith("-start"):
        return destination(instruction).hbm_bytes
    return instruction.hbm_bytes


def destination(start: Instruction) -> Shape:
    """Of an asynchronous start: a copy names it first, others after the operand."""
    return start.shapes[0 if start.opcode == "copy-start" or len(start.shapes) == 1 else 1]


def _fusion(program: Program, fusion: Instruction) -> Computation:
    return program.computations[called_computations(fusion)[0]]


def fusion_roots(program: Program, fusion: Instruction) -> list[tuple[Computation, Instruction]]:
    """What makes each of the fusion's results, with the computation that it stands in."""
    body = _fusion(program, fusion)
    root = next(instruction for instruction in body.values() if instruction.is_root)
    if root.opcode == "fusion":
        return fusion_roots(program, root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(root.shapes)
    return [_maker(program, body, result) for result in results]


def _maker(program: Program, body: Computation, value: Instruction) -> tuple[Computation, Instruction]:
    """The instruction behind bitcasts, elements of tuples and inner fusions."""
    if value.opcode == "bitcast":
        return _maker(program, body, body[value.operands[0]])
    if value.opcode == "get-tuple-element" and body[value.operands[0]].opcode == "fusion":
        return fusion_roots(program, body[value.operands[0]])[element_index(value)]
    return fusion_roots(program, value)[0] if value.opcode == "fusion" else (body, value)


def element_index(element: Instruction) -> int:
    """Which array of a tuple a `get-tuple-element` takes."""
    found = re.search(r"\bindex=(\d+)", element.attributes)
    assert found, f"{element.name} has no index"
    return int(found[1])


def _written_by_root(body: Computation, root: Instruction) -> int:
    if root.opcode in _UPDATES:
        return body[root.operands[_UPDATES[root.opcode]]].bytes
    return root.bytes


def _read_of_operand(program: Program, instruction: Instruction, position: int) -> int:
    """Bytes that an instruction reads of its operand at this position, at most."""
    if instruction.opcode in _SLICES and position == 0:
        return instruction.bytes
    if instruction.opcode == "slice-start":
        return destination(instruction).bytes
    if instruction.opcode in _UPDATES and position == 0:
        return 0
    if instruction.opcode != "fusion":
        return 2**63
    body = _fusion(program, instruction)
    parameter = next(i for i in body.values() if i.opcode == "parameter" and i.operands == (str(position),))
    return _read_of_value(program, body, parameter)


def _read_of_value(program: Program, body: Computation, value: Instruction) -> int:
    """Bytes that the users of a value inside a fusion read of it, at most."""
    total = 0
    for user in body.values():
        for position, name in enumerate(user.operands):
            if name == value.name:
                bitcast = user.opcode == "bitcast"
                total += _read_of_value(program, body, user) if bitcast else _read_of_operand(program, user, position)
    return total


def saved_activations(program: Program) -> int:
    """Bytes that the forward pass keeps for the backward pass: what its loops over layers stack up, layer by layer.

    0 where no loop is left, as of a single layer or `model.scan_layers=False`.
    """
    return sum(shape.bytes for shape in _saved_arrays(program))


def _saved_arrays(program: Program) -> Iterator[Shape]:
    for _, loop, _ in program.instructions():
        # JAX names the forward pass `jvp(...)` and the backward pass `transpose(jvp(...))`.
        if loop.opcode != "while" or "jvp(" not in loop.source or "transpose(" in loop.source:
            continue
        body = program.computations[called_computations(loop)[0]]
        root = next(instruction for instruction in body.values() if instruction.is_root)
        for name, shape in zip(root.operands, loop.shapes, strict=False):
            _, maker = _maker(program, body, body[name])
            if maker.opcode == "dynamic-update-slice" and maker.shapes[0].sizes == shape.sizes:
                yield shape
