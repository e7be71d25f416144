"""Kernels with a thread for each output element: additions, borders, concatenation, shortcuts."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import defined, dequantized, finish, quantized
from tvm_backend.kernels.cuda.generator import CudaGenerator
from tvm_backend.kernels.spec import (
    ConcatSpec,
    DequantizeSpec,
    ElementwiseSpec,
    KernelSpec,
    QuantizeSpec,
    SubsampleSpec,
)
from tvm_backend.kernels.tir import Expr

__all__ = [
    "CudaConcat",
    "CudaDequantize",
    "CudaElementwise",
    "CudaQuantize",
    "CudaSubsample",
    "Pointwise",
]

_THREADS = 256

_Spec = TypeVar("_Spec", bound=KernelSpec)


@dataclass(frozen=True)
class Pointwise(CudaGenerator[_Spec], Generic[_Spec]):
    """Base class of the generators of kernels with a thread for each place of the output."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        shape, batch = self.spec.out_shape, tir.batch_extent(self.spec.batch)
        size = math.prod(shape)
        with tir.Function(name, private=True) as function:
            buffers = function.buffers(self.arguments(batch))
            total = batch * size
            with device.threads([(total + _THREADS - 1) // _THREADS], _THREADS) as ((block,), thread):
                flat = block * _THREADS + thread
                with tir.when(flat < total):
                    image, rest = flat // size, tir.cast(flat % size, "int32")
                    indices: list[Expr] = []
                    for extent in reversed(shape):
                        indices.insert(0, rest % extent)
                        rest = rest // extent
                    self.emit(buffers, image, indices)
        return function.result

    @abstractmethod
    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place.

        Parameters
        ----------
        buffers : list of Buffer
            The kernel's arguments.
        image : Expr
            Number of the sample.
        indices : list of Expr
            The place within it.
        """


@dataclass(frozen=True)
class CudaElementwise(Pointwise[ElementwiseSpec]):
    """Generator of a sum or a requantization."""

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec = self.spec
        where, value = [image, *indices], None
        for buffer, kind in zip(buffers, spec.inputs, strict=False):
            value = dequantized(tir.load(buffer, where), kind, onto=value)
        finish(value, spec.epilogue, None, buffers[len(spec.inputs) :], where)


@dataclass(frozen=True)
class CudaQuantize(Pointwise[QuantizeSpec]):
    """Generator of a quantization."""

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec = self.spec
        there = [indices[2], *indices[:2]] if spec.to_channels_last else indices
        value = device.local(1, "float32")
        tir.store(value, tir.load(buffers[0], [image, *there]), [0])
        for output, kind in zip(buffers[1:], spec.outputs, strict=True):
            tir.store(output, quantized(defined(value[0], kind), kind), [image, *indices])


@dataclass(frozen=True)
class CudaDequantize(Pointwise[DequantizeSpec]):
    """Generator of a dequantization."""

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec = self.spec
        there = [*indices[1:], indices[0]] if spec.to_channels_first else indices
        value = dequantized(tir.load(buffers[0], [image, *there]), spec.input)
        tir.store(buffers[1], value, [image, *indices])


@dataclass(frozen=True)
class CudaSubsample(Pointwise[SubsampleSpec]):
    """Generator of a parameter-free shortcut."""

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec = self.spec
        y, x, channel = indices
        inside = tir.larger(tir.smaller(channel - spec.before, spec.channels - 1), 0)
        value = tir.load(buffers[0], [image, y * spec.stride[0], x * spec.stride[1], inside])
        zero = tir.constant(spec.input.zero_point, spec.input.dtype)
        tir.store(buffers[1], tir.if_else(inside == channel - spec.before, value, zero), [image, *indices])


@dataclass(frozen=True)
class CudaConcat(Pointwise[ConcatSpec]):
    """Generator of a concatenation along channels."""

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec = self.spec
        starts = [0, *accumulate(spec.channels)]
        outputs = buffers[len(spec.inputs) :]
        channel = indices[-1]
        for buffer, kind, start, end in zip(buffers, spec.inputs, starts, starts[1:], strict=False):
            with tir.when(tir.all_of(channel >= start, channel < end)):
                raw = tir.load(buffer, [image, *indices[:-1], channel - start])
                value = device.local(1, "float32")
                tir.store(value, dequantized(raw, kind), [0])
                for output, target in zip(outputs, spec.epilogue.outputs, strict=True):
                    same = target == kind and spec.epilogue.clip == (None, None)
                    result = raw if same else quantized(value[0], target, spec.epilogue.clip)
                    tir.store(output, result, [image, *indices])
