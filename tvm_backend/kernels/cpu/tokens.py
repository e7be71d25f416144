"""Dynamic quantization of tokens: the range of each, and its integers on a grid of its own, in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import functions, ir
from tvm_backend.kernels.cpu.epilogue import chunks, pieces
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import LEAST_SCALE, TokensSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Tokens", "reference"]

_COST = 2
"""What a number takes, where a number that is only moved takes one."""


def reference(spec: TokensSpec, data: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What the kernel computes, in numpy, to the bit where numbers are finite."""
    share, steps = np.float32(spec.share), np.float32(1 / spec.qmax)
    low = np.minimum(data.min(axis=1, keepdims=True), np.float32(0)) * share
    high = np.maximum(data.max(axis=1, keepdims=True), np.float32(0)) * share
    scale = np.maximum((high - low) * steps, np.float32(LEAST_SCALE))
    scale = scale + (data - data).sum(axis=1, keepdims=True)
    zero = np.rint(-low / scale)
    integers = np.clip(np.rint(data * (np.float32(1) / scale) + zero), 0, spec.qmax)
    if spec.real:
        return ((integers - zero) * scale,)
    return integers.astype(np.uint8), np.concatenate([scale, zero], axis=1)


@dataclass(frozen=True)
class Tokens(CpuGenerator[TokensSpec]):
    """Generator of the kernel for one :class:`TokensSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        batch = tir.batch_extent(self.spec.batch)
        with tir.Function(name) as function:
            data, *outputs = function.buffers(self.arguments(batch))
            tasks = Tasks(batch, 1, self.spec.features * _COST, TASK_ELEMENTS)
            tasks.run(lambda row, *_: self._row(data, outputs, row))
        return function.result

    def _row(self, data: Any, outputs: list[Any], row: Expr) -> None:
        spec = self.spec
        scale, zero = self._grid(data, row)
        inverse = ir.hold(tir.float32(1) / scale, "float32", 1)

        def integers(at: Expr, lanes: int) -> Expr:
            # Rounded before the zero point is added, as in PyTorch.
            ratio = ir.fence(tir.load(data, [row, at], lanes) * tir.broadcast(inverse, lanes), lanes)
            shifted = tir.larger(
                ratio + tir.broadcast(zero, lanes), tir.constant(0, "float32", lanes)
            )  # 0 of NaN
            clipped = tir.smaller(shifted, tir.constant(spec.qmax, "float32", lanes))
            vector = self.isa.narrows and lanes == self.isa.lanes
            return self.isa.round_to_int(clipped) if vector else ir.round_to_int(clipped, lanes)

        if spec.real:
            for begin, repeat, lanes in pieces(spec.features, self.isa.lanes):
                with tir.loop(repeat) as index:
                    at = begin + index * lanes
                    shifted = tir.cast(integers(at, lanes), "float32", lanes) - tir.broadcast(zero, lanes)
                    tir.store(outputs[0], shifted * tir.broadcast(scale, lanes), [row, at], lanes)
            return
        tir.store(outputs[1], scale, [row, 0])
        tir.store(outputs[1], zero, [row, 1])
        lanes = self.isa.lanes
        together = 4 * lanes if self.isa.narrows else lanes
        for begin, repeat, width in pieces(spec.features, together):
            with tir.loop(repeat) as index:
                at = begin + index * width
                if width > lanes or (self.isa.narrows and width == lanes):
                    wide = [integers(at + i * lanes, lanes) for i in range(width // lanes)]
                    packed = ir.hold(self.isa.narrow(wide, "uint8"), "uint8", together)
                    for start, count in chunks(width, together):
                        value = packed if count == together else ir.part(packed, start, count)
                        tir.store(outputs[0], value, [row, at + start], count)
                else:
                    tir.store(outputs[0], tir.cast(integers(at, width), "uint8", width), [row, at], width)

    def _grid(self, data: Any, row: Expr) -> tuple[Expr, Expr]:
        """Scale and zero point of a token, float32."""

        def values(at: Expr, lanes: int) -> list[Expr]:
            x = ir.hold(tir.load(data, [row, at], lanes), "float32", lanes)
            # The difference is 0, or NaN where the number is not finite.
            return [tir.constant(0, "float32", lanes) - x, x, x - ir.fence(x, lanes)]

        joins = ("max", "max", "add")
        least, most, finite = functions.folded(self.spec.features, self.isa.lanes, values, joins)
        share, none = tir.float32(self.spec.share), tir.float32(0)
        low = ir.hold(ir.fence(tir.larger(least, none) * share, 1), "float32", 1)  # of the other sign
        high = ir.fence(tir.larger(most, none) * share, 1)
        width = ir.fence((high + low) * tir.float32(1 / self.spec.qmax), 1)
        scale = ir.hold(tir.larger(width, tir.float32(LEAST_SCALE)) + finite, "float32", 1)
        zero = tir.cast(ir.round_to_int(low / scale, 1), "float32")
        return scale, ir.hold(zero, "float32", 1)
