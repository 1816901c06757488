"""Counts the FLOPs of a compiled program, including every iteration of its loops.

`compiled.cost_analysis()` counts a loop's body once; here each instruction counts as often as it runs.
"""

import re

import numpy as np

from switchjax.planning.hlo import Computation, Instruction, Program, Shape


def matmul_flops(program: Program) -> int:
    """FLOPs of a step's matmuls on one device; HLO has them as `dot` or, on TPUs, `convolution`.

    A multiplication and an addition count as two. Elementwise work does not count: reading its operands takes longer.
    A kernel counts with its author's estimate (Pallas' `cost_estimate`), or as 0 without one.
    """
    counts = {"dot": _dot_flops, "convolution": _convolution_flops, "custom-call": _kernel_flops}
    return sum(
        times * counts[instruction.opcode](instruction, computation)
        for computation, instruction, times in program.instructions()
        if instruction.opcode in counts
    )


def _operand_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
    return [computation[name].shapes[0] for name in instruction.operands]


def _dot_flops(dot: Instruction, computation: Computation) -> int:
    contracted = [int(axis) for axis in dot.attribute("lhs_contracting_dims").split(",") if axis]
    sizes = _operand_shapes(computation, dot)[0].sizes
    return 2 * dot.shapes[0].elements * int(np.prod([sizes[axis] for axis in contracted], dtype=np.int64))


def _kernel_flops(call: Instruction, _: Computation) -> int:
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', call.attributes)
    return int(found[1]) if found else 0


def _convolution_flops(convolution: Instruction, computation: Computation) -> int:
    """Counts products of real elements, not of padding or of the zeros of dilation."""
    found = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert found, f"{convolution.name} has no dim_labels"
    shapes = (*_operand_shapes(computation, convolution)[:2], convolution.shapes[0])
    inputs, kernel, outputs = (
        dict(zip(labels, shape.sizes, strict=True)) for labels, shape in zip(found.groups(), shapes, strict=True)
    )
    window = dict(re.findall(r"(\w+)=(\S+)", convolution.attribute("window")))
    # `kernel["i"]` has the features of one feature group, and `outputs["b"]` the rows of one batch group.
    products = kernel["i"] * outputs["f"] * outputs["b"]
    for i, label in enumerate(sorted(name for name in kernel if name.isdigit())):
        setting = {name: values.split("x")[i] for name, values in window.items()}
        products *= _valid_positions(inputs[label], kernel[label], outputs[label], setting)
    return 2 * products


def _valid_positions(size: int, kernel: int, outputs: int, window: dict[str, str]) -> int:
    """Pairs of an output and a kernel position that fall on an input element, along one dimension."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, base, dilation = (int(window.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    places = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None, :] * dilation - low
    return int(((places >= 0) & (places % base == 0) & (places // base < size)).sum())
