"""The parameter-free shortcut of CIFAR ResNets: every stride-th pixel, zero channels around the input's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.ir import Expr
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import SubsampleSpec

__all__ = ["Subsample", "reference"]


def reference(spec: SubsampleSpec, data: NDArray[Any]) -> tuple[NDArray[Any]]:
    """What the kernel computes, in numpy."""
    picked = data[:, :: spec.stride[0], :: spec.stride[1]]
    channels = ((0, 0), (0, 0), (0, 0), (spec.before, spec.after))
    return (np.pad(picked, channels, constant_values=spec.input.zero_point),)


@dataclass(frozen=True)
class Subsample(CpuGenerator[SubsampleSpec]):
    """Generator of the kernel for one :class:`SubsampleSpec`."""

    def build(self, name: str) -> PrimFunc:
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
