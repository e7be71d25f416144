"""Sum of one or two tensors, clipped and quantized anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import add_to, apply_epilogue, dequantize
from tvm_backend.kernels.cpu.epilogue import dequantized, finish
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.quantity import Finish, Quantity
from tvm_backend.kernels.cpu.tasks import flat
from tvm_backend.kernels.spec import ElementwiseSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Elementwise", "reference"]


def reference(spec: ElementwiseSpec, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What the kernel computes, in numpy."""
    value = dequantize(inputs[0], spec.inputs[0])
    for tensor, kind in zip(inputs[1:], spec.inputs[1:], strict=True):
        value = add_to(value, tensor, kind)
    return apply_epilogue(value, spec.epilogue)


@dataclass(frozen=True)
class Elementwise(CpuGenerator[ElementwiseSpec]):
    """Generator of the kernel for one :class:`ElementwiseSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        lead = [0] * (len(spec.shape) - 1)
        with tir.Function(name) as function:
            buffers = function.buffers(self.arguments(batch))
            inputs, outputs = buffers[: len(spec.inputs)], buffers[len(spec.inputs) :]

            def vectors(image: Expr, start: Expr, width: int) -> None:
                where = [image, *lead, start]
                value = None
                for buffer, kind in zip(inputs, spec.inputs, strict=True):
                    value = dequantized(tir.load(buffer, where, width), Quantity.any(kind), width, onto=value)
                finish(value, Finish.of(spec.epilogue), None, outputs, where, width)

            flat(batch, math.prod(spec.shape), self.isa.lanes, vectors)
        return function.result
