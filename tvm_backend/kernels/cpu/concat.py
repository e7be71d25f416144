"""Concatenation along channels with requantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue, dequantize
from tvm_backend.kernels.cpu.epilogue import dequantized, finish, pieces
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.quantity import Finish, Quantity
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import ConcatSpec, Epilogue
from tvm_backend.kernels.tir import Expr

__all__ = ["Concat", "reference"]


def reference(spec: ConcatSpec, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What the kernel computes, in numpy."""
    parts = [
        apply_epilogue(dequantize(tensor, kind), spec.epilogue)
        for tensor, kind in zip(inputs, spec.inputs, strict=True)
    ]
    return tuple(np.concatenate(tensors, axis=-1) for tensors in zip(*parts, strict=True))


@dataclass(frozen=True)
class Concat(CpuGenerator[ConcatSpec]):
    """Generator of the kernel for one :class:`ConcatSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        places = math.prod(spec.shape)
        lead = [0] * max(0, len(spec.shape) - 1)
        with tir.Function(name) as function:
            buffers = function.buffers(self.arguments(batch))
            inputs, outputs = buffers[: len(spec.inputs)], buffers[len(spec.inputs) :]
            starts = [0, *accumulate(spec.channels)]

            def task(image: Expr, first: Expr, count: Expr) -> None:
                with tir.loop(count) as place:
                    at([image, *lead, first + place] if spec.shape else [image])

            def at(where: list[Expr]) -> None:
                for buffer, kind, channels, start in zip(
                    inputs, spec.inputs, spec.channels, starts, strict=False
                ):
                    for begin, repeat, lanes in pieces(channels, self.isa.lanes):
                        with tir.loop(repeat) as piece:
                            channel = begin + piece * lanes
                            raw = tir.load(buffer, [*where, channel], lanes)
                            there = [*where, start + channel]
                            for output, target in zip(outputs, spec.epilogue.outputs, strict=True):
                                if target == kind and spec.epilogue.clip == (None, None):
                                    tir.store(output, raw, there, lanes)
                                else:
                                    value = dequantized(raw, Quantity.of(kind), lanes)
                                    one = Finish.of(Epilogue(spec.epilogue.clip, None, (target,)))
                                    finish(value, one, None, [output], there, lanes)

            Tasks(batch, places, sum(spec.channels), TASK_ELEMENTS).run(task)
        return function.result
