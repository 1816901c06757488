"""What a compiled program reads and writes in a device's memory, and what it keeps for the backward pass."""

import re

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

    Each instruction outside of fusions reads its operands and writes its results, except arrays that the compiler
    places on the chip (memory space `S(1)`). Where an array is only sliced or updated in place, the slice counts.
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
    if opcode.endswith("-start"):
        return reads + destination(instruction).hbm_bytes
    results = zip(_makers(program, computation, instruction), instruction.shapes, strict=True)
    return reads + sum(min(shape.bytes, _written(*maker)) for maker, shape in results if shape.in_hbm)


def destination(start: Instruction) -> Shape:
    """The array that an asynchronous start fills: a copy names it first, others after the operand."""
    return start.shapes[0 if start.opcode == "copy-start" or len(start.shapes) == 1 else 1]


def _fusion(program: Program, fusion: Instruction) -> Computation:
    return program.computations[called_computations(fusion)[0]]


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _makers(program: Program, body: Computation, value: Instruction) -> list[tuple[Computation, Instruction]]:
    """The instruction that computes each array of a value, and where it stands: inside fusions, behind bitcasts."""
    if value.opcode == "fusion":
        body = _fusion(program, value)
        return _makers(program, body, _root(body))
    if value.opcode == "tuple":
        return [_makers(program, body, body[name])[0] for name in value.operands]
    if value.opcode == "bitcast":
        return _makers(program, body, body[value.operands[0]])
    if value.opcode == "get-tuple-element" and body[value.operands[0]].opcode == "fusion":
        index = re.search(r"\bindex=(\d+)", value.attributes)
        assert index, f"{value.name} has no index"
        return [_makers(program, body, body[value.operands[0]])[int(index[1])]]
    return [(body, value)] * len(value.shapes)


def _written(body: Computation, maker: Instruction) -> int:
    if maker.opcode in _UPDATES:
        return body[maker.operands[_UPDATES[maker.opcode]]].bytes
    return maker.bytes


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

    0 where no loop is left, as for a single layer or `model.scan_layers=False`.
    """
    saved = 0
    for _, loop, _ in program.instructions():
        # JAX names the forward pass `jvp(...)` and the backward pass `transpose(jvp(...))`.
        if loop.opcode == "while" and "jvp(" in loop.source and "transpose(" not in loop.source:
            body = program.computations[called_computations(loop)[0]]
            for (_, maker), shape in zip(_makers(program, body, _root(body)), loop.shapes, strict=False):
                if maker.opcode == "dynamic-update-slice" and maker.shapes[0].sizes == shape.sizes:
                    saved += shape.bytes
    return saved
