"""Counts the bytes that a compiled program reads, writes and keeps for the backward pass in a device's memory."""

import re

from switchjax.planning.hlo import Computation, Instruction, Program, Shape, called_computations

# These move no bytes: they name arrays that memory already holds, or their bodies are counted instead.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"})
_FREE |= {"while", "conditional", "call", "partition-id", "replica-id"}
_SLICES = ("dynamic-slice", "slice", "gather")
"""Operations that read only as much of their first operand as they return."""
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operation -> position of its operand with the update: it writes only that, in place."""
_KERNEL = "tpu_custom_call"
"""The custom call that computes; the TPU compiler's other custom calls are annotations."""


def memory_traffic(program: Program) -> int:
    """Bytes that a step reads from and writes to one device's HBM, including every iteration of loops.

    Each instruction outside of fusions reads its operands and writes its results, except arrays that the compiler
    places on the chip (memory space `S(1)`). If an instruction slices or updates an array in place, the slice counts.
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
    """The array that an asynchronous start fills: first in a copy's result, second in others, after the operand."""
    return start.shapes[0 if start.opcode == "copy-start" or len(start.shapes) == 1 else 1]


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _makers(program: Program, body: Computation, value: Instruction) -> list[tuple[Computation, Instruction]]:
    """Each array's computing instruction and its computation, found through fusions and bitcasts."""
    if value.opcode == "fusion":
        body = program.computations[called_computations(value)[0]]
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
    """The most bytes that an instruction reads of its operand at this position."""
    if instruction.opcode in _SLICES and position == 0:
        return instruction.bytes
    if instruction.opcode == "slice-start":
        return destination(instruction).bytes
    if instruction.opcode in _UPDATES and position == 0:
        return 0
    if instruction.opcode != "fusion":
        return 2**63
    body = program.computations[called_computations(instruction)[0]]
    parameter = next(i for i in body.values() if i.opcode == "parameter" and i.operands == (str(position),))
    return _read_of_value(program, body, parameter)


def _read_of_value(program: Program, body: Computation, value: Instruction) -> int:
    """The most bytes that instructions inside a fusion read of a value."""
    total = 0
    for user in body.values():
        for position, name in enumerate(user.operands):
            if name == value.name:
                bitcast = user.opcode == "bitcast"
                total += _read_of_value(program, body, user) if bitcast else _read_of_operand(program, user, position)
    return total


def saved_activations(program: Program) -> int:
    """Bytes that the forward pass keeps for the backward pass: the arrays that its loops over layers stack.

    The result is 0 without such a loop, as with a single layer or `model.scan_layers=False`.
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
