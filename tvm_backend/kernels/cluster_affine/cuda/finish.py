"""Softmax or the largest values of a corrected row on CUDA, by warps that share nothing but registers.

A warp reads a row once for the softmax's maximum and sum, and once more to store it.  For the largest values each lane
remembers the best of its own columns; the winner of a round looks through its columns again, for the next one in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine.cuda.emitter import Emitter
from tvm_backend.kernels.cuda import device

__all__ = ["FinishingEmitter"]

_LOWEST = -3.4028234e38
_NONE = 2**31 - 1
"""The column of a lane that has none left."""

_Value = Callable[[Any], Any]


def _exp(value: Any) -> Any:
    """The accurate function, where TVM's own becomes ``__expf``."""
    return device.call("float32", "expf", value)


class FinishingEmitter(Emitter):
    """What is made of a corrected row when its logits are not the result."""

    def finish_row(self, row: Any, value: _Value, lane: Any, thread: Any, threads: int) -> None:
        """Store what ``spec.finish`` asks for.

        Parameters
        ----------
        row : Expr
            Where to store.
        value : callable
            Emits what computes the corrected logit of a column and returns it, in float32.
        lane : Expr
            Lane within the warp; every warp that comes here reads the whole row.
        thread, threads : Expr, int
            This thread's number among those that share the stores of the softmax.
        """
        if self.spec.finish == "softmax":
            self._softmax(row, value, lane, thread, threads)
        else:
            self._largest(row, value, lane)

    def _softmax(self, row: Any, value: _Value, lane: Any, thread: Any, threads: int) -> None:
        classes = self.spec.n_classes
        largest, total, higher = device.local(1), device.local(1), device.local(1)

        def add(place: Any, count: Any) -> None:
            """`count` times ``exp(place)`` more, with the sum kept relative to the largest exponent."""
            self.put(higher, tir.larger(largest[0], place), 0)
            kept = total[0] * _exp(largest[0] - higher[0])
            self.put(total, kept + count * _exp(place - higher[0]), 0)
            self.put(largest, higher[0], 0)

        # A finite start: the difference of two infinities would be no number.
        self.put(largest, tir.float32(_LOWEST), 0)
        self.put(total, tir.float32(0), 0)
        with tir.loop(-(-classes // 32)) as step, tir.when(step * 32 + lane < classes):
            found = device.local(1)
            self.put(found, value(step * 32 + lane), 0)
            add(found[0], tir.float32(1))
        for distance in (16, 8, 4, 2, 1):
            other = device.local(2)
            self.put(other, device.exchanged(largest[0], distance, "float32"), 0)
            self.put(other, device.exchanged(total[0], distance, "float32"), 1)
            add(other[0], other[1])
        self.put(total, tir.float32(1) / total[0], 0)
        with tir.loop(-(-classes // threads)) as step, tir.when(step * threads + thread < classes):
            column = step * threads + thread
            found = device.local(1)
            self.put(found, _exp(value(column) - largest[0]) * total[0], 0)
            self.put(self.arg["output"], found[0].astype(self.spec.dtype), row, column)

    def _largest(self, row: Any, value: _Value, lane: Any) -> None:
        """One round for each value, in which the smallest negative wins, the lowest column among equals."""
        spec, arg, classes = self.spec, self.arg, self.spec.n_classes
        own, column = device.local(1), device.local(1, "int32")
        last, last_column = device.local(1), device.local(1, "int32")
        stale = device.local(1, "int32")
        self.put(last, tir.float32(float("-inf")), 0)
        self.put(last_column, tir.int32(-1), 0)
        self.put(stale, tir.int32(1), 0)
        with tir.loop(spec.top_k) as place:
            # All searches are this one, so that a value which is computed twice has the same bits both times.
            with tir.when(stale[0] == 1):
                self.put(own, tir.float32(float("inf")), 0)
                self.put(column, tir.int32(_NONE), 0)
                with tir.loop(-(-classes // 32)) as step, tir.when(step * 32 + lane < classes):
                    found = device.local(1)
                    self.put(found, tir.float32(0) - value(step * 32 + lane), 0)
                    equal = tir.all_of(found[0] == last[0], step * 32 + lane > last_column[0])
                    is_left = tir.either(found[0] > last[0], equal)
                    better = tir.either(found[0] < own[0], column[0] == _NONE)
                    with tir.when(tir.all_of(is_left, better)):
                        self.put(own, found[0], 0)
                        self.put(column, step * 32 + lane, 0)
            self.put(last, own[0], 0)
            self.put(last_column, column[0], 0)
            self.warp_first_minimum(last, last_column)
            with tir.when(lane == 0):
                self.put(arg["values"], (tir.float32(0) - last[0]).astype(spec.dtype), row, place)
                # In range even if no comparison holds.
                found_class = tir.smaller(last_column[0], tir.int32(classes - 1))
                self.put(arg["classes"], found_class.astype("int64"), row, place)
            self.put(stale, tir.select(column[0] == last_column[0], tir.int32(1), tir.int32(0)), 0)
