"""Depthwise and grouped convolutions: a thread for each output value, neighbours in neighbouring channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import finish_sum
from tvm_backend.kernels.cuda.generator import CudaGenerator
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import Argument, ConvSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Grouped"]

_THREADS = 256


@dataclass(frozen=True)
class Grouped(CudaGenerator[ConvSpec]):
    """Generator of the kernel for one :class:`ConvSpec` of several groups."""

    @classmethod
    def takes(cls, spec: ConvSpec, isa: Machine) -> bool:
        """Whether there are groups."""
        return spec.groups > 1

    @property
    def stored_zero(self) -> int:
        """The zero point of the activations as they are multiplied."""
        return self.spec.input.zero_point

    @property
    def weight_length(self) -> int:
        """Bytes of the weight."""
        return math.prod(self.spec.weight_shape)

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Taps and inputs first, output channels last; one byte a weight."""
        ordered = np.asarray(weight, np.int8).transpose(2, 3, 1, 0)
        return np.ascontiguousarray(ordered).reshape(-1)

    def arguments(self, batch: Expr) -> list[Argument]:
        """The kernel's arguments, in order."""
        return self.spec.weighted_arguments(batch, self.weight_length, "int8")

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        arguments = self.arguments(batch)
        with tir.Function(name, private=True) as function:
            buffers = dict(zip([name for name, _, _ in arguments], function.buffers(arguments), strict=True))
            size = spec.out_height * spec.out_width * spec.out_channels
            total = batch * size
            with device.threads([(total + _THREADS - 1) // _THREADS], _THREADS) as ((block,), thread):
                flat = block * _THREADS + thread
                with tir.when(flat < total):
                    place = tir.cast(flat % size, "int32")
                    pixel, channel = place // spec.out_channels, place % spec.out_channels
                    self._value(
                        buffers, flat // size, pixel // spec.out_width, pixel % spec.out_width, channel
                    )
        return function.result

    def _value(self, buffers: dict[str, Any], image: Expr, y: Expr, x: Expr, channel: Expr) -> None:
        spec = self.spec
        inputs = spec.in_channels // spec.groups
        first = channel // (spec.out_channels // spec.groups) * inputs
        total = device.local(1, "int32")
        tir.store(total, tir.constant(0, "int32"), [0])
        zero = tir.constant(spec.input.zero_point, "int32")
        for i in range(spec.kernel[0]):
            for j in range(spec.kernel[1]):
                row = y * spec.stride[0] - spec.padding[0] + i * spec.dilation[0]
                column = x * spec.stride[1] - spec.padding[1] + j * spec.dilation[1]
                row_in = tir.smaller(tir.larger(row, 0), spec.height - 1)
                column_in = tir.smaller(tir.larger(column, 0), spec.width - 1)
                inside = tir.all_of(row == row_in, column == column_in)
                with tir.loop(inputs) as c:
                    raw = tir.load(buffers["data"], [image, row_in, column_in, first + c])
                    value = tir.if_else(inside, tir.cast(raw, "int32"), zero)
                    tap = (i * spec.kernel[1] + j) * inputs + c
                    weight = tir.load(buffers["weight"], [tap * spec.out_channels + channel])
                    tir.store(total, total[0] + value * tir.cast(weight, "int32"), [0])
        outputs = [buffers[f"output{i}"] for i in range(len(spec.epilogue.outputs))]
        finish_sum(total[0], channel, buffers, spec.epilogue, outputs, [image, y, x, channel])
