"""The parameter-free shortcut of CIFAR ResNets: every stride-th pixel, zero channels around the input's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.ir import Expr
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import SubsampleSpec

__all__ = ["Subsample", "reference"]


def reference(spec: SubsampleSpec, data: NDArray[Any]) -> tuple[NDArray[Any]]:
    """What the kernel computes, in numpy."""
    picked = data[:, :: spec.stride[0], :: spec.stride[1]]
    channels = ((0, 0), (0, 0), (0, 0), (spec.before, spec.after))
    return (np.pad(picked, channels, constant_values=spec.input.zero_point),)


@dataclass(frozen=True)
class Subsample:
    """Generator of the kernel for one specification.

    Parameters
    ----------
    spec : SubsampleSpec
        What to compute.
    isa : InstructionSet
        Not used: copies are left to LLVM.
    """

    spec: SubsampleSpec
    isa: InstructionSet

    def arguments(self, batch: Expr) -> list[ir.Argument]:
        """Arguments of the kernel."""
        spec = self.spec
        return [
            ("data", (batch, spec.height, spec.width, spec.channels), spec.input.dtype),
            ("output0", (batch, *spec.out_shape), spec.input.dtype),
        ]

    def build(self, name: str) -> Any:
        """The PrimFunc."""
        spec = self.spec
        batch = ir.batch_extent(spec.batch)
        rows, columns, channels = spec.out_shape
        zero = ir.constant(spec.input.zero_point, spec.input.dtype)
        with ir.Function(name) as function:
            data, output = function.buffers(self.arguments(batch))

            def task(image: Expr, first: Expr, count: Expr) -> None:
                with ir.loop(count) as row, ir.loop(columns) as x:
                    y = first + row
                    for start, repeat in ((0, spec.before), (spec.before + spec.channels, spec.after)):
                        if repeat:
                            with ir.loop(repeat) as c:
                                ir.store(output, zero, [image, y, x, start + c])
                    with ir.loop(spec.channels) as c:
                        value = ir.load(data, [image, y * spec.stride[0], x * spec.stride[1], c])
                        ir.store(output, value, [image, y, x, spec.before + c])

            Tasks(batch, rows, columns * channels, TASK_ELEMENTS).run(task)
        return function.result
