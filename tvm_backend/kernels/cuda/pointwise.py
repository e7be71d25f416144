"""Kernels with a thread for each output element: additions, borders, pooling, concatenation, shortcuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from tvm_backend.kernels.arithmetic import storage_dtype
from tvm_backend.kernels.cpu.epilogue import output_arguments, residual_argument
from tvm_backend.kernels.cpu.ir import Argument, Expr, batch_extent
from tvm_backend.kernels.cpu.pool import _divisors
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import dequantized, finish, quantized
from tvm_backend.kernels.spec import (
    ConcatSpec,
    DequantizeSpec,
    ElementwiseSpec,
    PoolSpec,
    QuantizeSpec,
    SubsampleSpec,
)

__all__ = ["concat", "dequantize", "elementwise", "pool", "quantize", "subsample"]

_THREADS = 256


def _each(
    batch: int | None,
    shape: Sequence[int],
    arguments: Callable[[Expr], list[Argument]],
    body: Callable[[list[Any], Expr, list[Expr]], None],
) -> Any:
    """A function with a thread for each place of ``(batch, *shape)``; `body` takes buffers, image and indices."""
    size = math.prod(shape)
    with device.Function() as function:
        extent = batch_extent(batch)
        buffers = function.buffers(arguments(extent))
        total = extent * size
        with device.threads([(total + _THREADS - 1) // _THREADS], _THREADS) as ((block,), thread):
            flat = block * _THREADS + thread
            with device.when(flat < total):
                image, rest = flat // size, device.cast(flat % size, "int32")
                indices: list[Expr] = []
                for extent_ in reversed(shape):
                    indices.insert(0, rest % extent_)
                    rest = rest // extent_
                body(buffers, image, indices)
    return function.result


def elementwise(spec: ElementwiseSpec) -> Any:
    """The PrimFunc of a sum or a requantization."""

    def arguments(batch: Expr) -> list[Argument]:
        shape = (batch, *spec.shape)
        inputs = [(f"input{i}", shape, storage_dtype(kind)) for i, kind in enumerate(spec.inputs)]
        return [*inputs, *output_arguments(spec.epilogue, shape)]

    def body(buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        where, value = [image, *indices], None
        for buffer, kind in zip(buffers, spec.inputs, strict=False):
            value = dequantized(device.load(buffer, where), kind, onto=value)
        finish(value, spec.epilogue, None, buffers[len(spec.inputs) :], where)

    return _each(spec.batch, spec.shape, arguments, body)


def quantize(spec: QuantizeSpec) -> Any:
    """The PrimFunc of a quantization."""
    shape = (*spec.shape[1:], spec.shape[0]) if spec.to_channels_last else spec.shape

    def arguments(batch: Expr) -> list[Argument]:
        outputs = [(f"output{i}", (batch, *shape), kind.dtype) for i, kind in enumerate(spec.outputs)]
        return [("data", (batch, *spec.shape), "float32"), *outputs]

    def body(buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        there = [indices[2], *indices[:2]] if spec.to_channels_last else indices
        value = device.local(1, "float32")
        device.store(value, device.load(buffers[0], [image, *there]), [0])
        for output, kind in zip(buffers[1:], spec.outputs, strict=True):
            device.store(output, quantized(value[0], kind), [image, *indices])

    return _each(spec.batch, shape, arguments, body)


def dequantize(spec: DequantizeSpec) -> Any:
    """The PrimFunc of a dequantization."""
    shape = (spec.shape[2], *spec.shape[:2]) if spec.to_channels_first else spec.shape

    def arguments(batch: Expr) -> list[Argument]:
        return [("data", (batch, *spec.shape), spec.input.dtype), ("output0", (batch, *shape), "float32")]

    def body(buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        there = [*indices[1:], indices[0]] if spec.to_channels_first else indices
        value = dequantized(device.load(buffers[0], [image, *there]), spec.input)
        device.store(buffers[1], value, [image, *indices])

    return _each(spec.batch, shape, arguments, body)


def subsample(spec: SubsampleSpec) -> Any:
    """The PrimFunc of a parameter-free shortcut."""

    def arguments(batch: Expr) -> list[Argument]:
        shape = (batch, spec.height, spec.width, spec.channels)
        return [("data", shape, spec.input.dtype), ("output0", (batch, *spec.out_shape), spec.input.dtype)]

    def body(buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        y, x, channel = indices
        inside = device.larger(device.smaller(channel - spec.before, spec.channels - 1), 0)
        value = device.load(buffers[0], [image, y * spec.stride[0], x * spec.stride[1], inside])
        zero = device.constant(spec.input.zero_point, spec.input.dtype)
        device.store(buffers[1], device.pick(inside == channel - spec.before, value, zero), [image, *indices])

    return _each(spec.batch, spec.out_shape, arguments, body)


def concat(spec: ConcatSpec) -> Any:
    """The PrimFunc of a concatenation along channels."""
    shape = (*spec.shape, sum(spec.channels))

    def arguments(batch: Expr) -> list[Argument]:
        inputs = [
            (f"input{i}", (batch, *spec.shape, channels), kind.dtype)
            for i, (channels, kind) in enumerate(zip(spec.channels, spec.inputs, strict=True))
        ]
        return [*inputs, *output_arguments(spec.epilogue, (batch, *shape))]

    def body(buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        starts = [0, *accumulate(spec.channels)]
        outputs = buffers[len(spec.inputs) :]
        channel = indices[-1]
        for buffer, kind, start, end in zip(buffers, spec.inputs, starts, starts[1:], strict=False):
            with device.when(device.all_of(channel >= start, channel < end)):
                raw = device.load(buffer, [image, *indices[:-1], channel - start])
                value = device.local(1, "float32")
                device.store(value, dequantized(raw, kind), [0])
                for output, target in zip(outputs, spec.epilogue.outputs, strict=True):
                    same = target == kind and spec.epilogue.clip == (None, None)
                    result = raw if same else quantized(value[0], target, spec.epilogue.clip)
                    device.store(output, result, [image, *indices])

    return _each(spec.batch, shape, arguments, body)


def pool(spec: PoolSpec) -> Any:
    """The PrimFunc of max or average pooling."""
    shape = (spec.out_height, spec.out_width, spec.channels)

    def arguments(batch: Expr) -> list[Argument]:
        out_shape = (batch, *shape)
        return [
            ("data", (batch, spec.height, spec.width, spec.channels), spec.input.dtype),
            *residual_argument(spec.epilogue, out_shape),
            *output_arguments(spec.epilogue, out_shape),
        ]

    def body(buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        data, *rest = buffers
        residual = rest.pop(0) if spec.epilogue.residual is not None else None
        y, x, channel = indices
        top, left = y * spec.stride[0] - spec.padding[0], x * spec.stride[1] - spec.padding[1]
        held = device.local(1, "int32")
        lowest = 0 if spec.kind == "avg" else -128 if spec.input.signed else 0
        device.store(held, device.constant(lowest, "int32"), [0])
        with device.loop(spec.kernel[0]) as i, device.loop(spec.kernel[1]) as j:
            row, column = top + i, left + j
            with device.when(device.all_of(row >= 0, row < spec.height, column >= 0, column < spec.width)):
                raw = device.cast(device.load(data, [image, row, column, channel]), "int32")
                centred = raw - device.constant(spec.input.zero_point, "int32")
                found = device.larger(held[0], raw) if spec.kind == "max" else held[0] + centred
                device.store(held, found, [0])
        where = [image, *indices]
        if spec.kind == "max":
            value = dequantized(held[0], spec.input)
        else:
            value = device.times(device.cast(held[0], "float32"), _factor(spec, y, x))
        finish(value, spec.epilogue, residual, rest, where)

    return _each(spec.batch, shape, arguments, body)


def _factor(spec: PoolSpec, y: Expr, x: Expr) -> Expr:
    """``float32(scale / divisor)`` of a window: one constant, or a choice among the places that differ."""
    divisors = _divisors(spec)
    values, counts = np.unique(divisors, return_counts=True)
    usual = int(values[counts.argmax()])

    def constant(divisor: int) -> Expr:
        return device.constant(float(np.float32(spec.input.scale / divisor)), "float32")

    if len(values) == 1:
        return constant(usual)
    # The number of places inside the input (or its padding) is a product of two extents.
    top, left, bottom, right = spec.padding if spec.count_include_pad else (0, 0, 0, 0)
    before = spec.padding[:2]
    rows = _extent(y, spec.stride[0], before[0], spec.kernel[0], -top, spec.height + bottom)
    columns = _extent(x, spec.stride[1], before[1], spec.kernel[1], -left, spec.width + right)
    result = constant(usual)
    for value in values:
        if int(value) != usual:
            result = device.pick(rows * columns == int(value), constant(int(value)), result)
    return result


def _extent(index: Expr, stride: int, before: int, kernel: int, low: int, high: int) -> Expr:
    """Places of a window along one axis between two limits."""
    start = index * stride - before
    return device.smaller(start + kernel, high) - device.larger(start, low)
