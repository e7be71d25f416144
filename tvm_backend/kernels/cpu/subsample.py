"""The parameter-free shortcut of CIFAR ResNets: every stride-th pixel, zero channels around the input's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import SubsampleSpec
from tvm_backend.kernels.tir import Expr

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
        batch = tir.batch_extent(spec.batch)
        rows, columns, channels = spec.out_shape
        zero = tir.constant(spec.input.zero_point, spec.input.dtype)
        with tir.Function(name) as function:
            data, output = function.buffers(self.arguments(batch))

            def task(image: Expr, first: Expr, count: Expr) -> None:
                with tir.loop(count) as row, tir.loop(columns) as x:
                    y = first + row
                    for start, repeat in ((0, spec.before), (spec.before + spec.channels, spec.after)):
                        if repeat:
                            with tir.loop(repeat) as c:
                                tir.store(output, zero, [image, y, x, start + c])
                    with tir.loop(spec.channels) as c:
                        value = tir.load(data, [image, y * spec.stride[0], x * spec.stride[1], c])
                        tir.store(output, value, [image, y, x, spec.before + c])

            Tasks(batch, rows, columns * channels, TASK_ELEMENTS).run(task)
        return function.result
