"""The cluster-affine step on CUDA for few rows: a block of threads for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine.cuda.emitter import THREADS, WARPS
from tvm_backend.kernels.cluster_affine.cuda.finish import FinishingEmitter
from tvm_backend.kernels.cuda import device

__all__ = ["RowKernel"]


class RowKernel(FinishingEmitter):
    """A block for each row."""

    def emit(self) -> None:
        """Write the whole body."""
        spec, arg, d = self.spec, self.arg, self.spec.n_components
        with device.threads([self.batch], THREADS) as ((row,), thread):
            warp, lane = thread // 32, thread % 32
            inputs, cluster = device.shared(spec.width), device.shared(1, "int32")
            distance = device.shared(spec.n_clusters)
            points = device.shared(d) if d else inputs
            with tir.loop(-(-spec.width // THREADS)) as step:
                column = step * THREADS + thread
                with tir.when(column < spec.width):
                    value = self.source(row, column)
                    self.put(inputs, value - arg["mean"][column] if d else value, column)
            device.barrier()
            if d:
                self._sums(
                    warp, lane, d, spec.width, points, lambda j, c: inputs[c] * arg["components"][j, c]
                )
                device.barrier()

            def squared(j: Any, c: Any) -> Any:
                difference = points[c] - arg["centroids"][j, c]
                return difference * difference

            self._sums(warp, lane, spec.n_clusters, spec.distance_width, distance, squared)
            device.barrier()
            with tir.when(warp == 0):
                best, index = device.local(1), device.local(1, "int32")
                self.scan(best, index, lane, lambda k: distance[k])
                with tir.when(lane == 0):
                    self.put(cluster, index[0], 0)
            device.barrier()
            reduced = self._reduced(points, cluster[0], warp, lane) if spec.rank else None
            self._map(row, cluster[0], thread, None if reduced is None else reduced.__getitem__)

    def _map(self, row: Any, cluster: Any, thread: Any, term: Callable[[Any], Any] | None) -> None:
        """Map the row and store what is asked for."""
        spec, arg, warp, lane = self.spec, self.arg, thread // 32, thread % 32
        full = spec.has("weight")
        if spec.finish == "logits":
            if full:
                self._full(row, cluster, warp, lane, lambda j: (arg["output"], (row, j)))
            else:
                self.map_row(row, cluster, thread, THREADS, term)
            return
        corrected = device.shared(spec.n_classes)
        if full:
            self._full(row, cluster, warp, lane, lambda j: (corrected, (j,)))
        else:
            with tir.loop(-(-spec.n_classes // THREADS)) as step:
                column = step * THREADS + thread
                with tir.when(column < spec.n_classes):
                    self.put(corrected, self.corrected(row, cluster, column, term), column)
        device.barrier()
        # Every warp needs the softmax's maximum and sum; the largest values are for one to find.
        with nullcontext() if spec.finish == "softmax" else tir.when(warp == 0):
            self.finish_row(row, corrected.__getitem__, lane, thread, THREADS)

    def _sums(
        self, warp: Any, lane: Any, count: int, extent: int, result: Any, term: Callable[[Any, Any], Any]
    ) -> None:
        """``result[j] = sum_c term(j, c)`` for j < count, a warp for each j."""

        def store(j: Any, value: Any) -> None:
            with tir.when(lane == 0):
                self.put(result, value, j)

        self._each_sum(warp, lane, count, extent, term, store)

    def _reduced(self, points: Any, cluster: Any, warp: Any, lane: Any) -> Any:
        """``p @ core_k`` in shared memory."""
        spec, core = self.spec, self.arg["core"]
        steps = -(-spec.rank // WARPS)
        totals, result = device.local(steps), device.shared(spec.rank)
        for step in range(steps):
            j = tir.smaller(step * WARPS + warp, spec.rank - 1)
            self.put(totals, tir.float32(0), step)
            with (
                tir.loop(-(-spec.core_height // 32)) as piece,
                tir.when(piece * 32 + lane < spec.core_height),
            ):
                c = piece * 32 + lane
                self.put(totals, totals[step] + points[c] * core[cluster, c, j], step)
            self.warp_sum(totals, step)
        # TVM may give the result the memory of the points, which are not needed any more: wait for all readers.
        device.barrier()
        for step in range(steps):
            with tir.when(tir.all_of(lane == 0, step * WARPS + warp < spec.rank)):
                self.put(result, totals[step], step * WARPS + warp)
        device.barrier()
        return result

    def _each_sum(
        self,
        warp: Any,
        lane: Any,
        count: int,
        extent: int,
        term: Callable[[Any, Any], Any],
        store: Callable[[Any, Any], None],
    ) -> None:
        total = device.local(1)
        with tir.loop(-(-count // WARPS)) as step:
            j = step * WARPS + warp
            with tir.when(j < count):
                self.put(total, tir.float32(0), 0)
                with tir.loop(extent // 32) as piece:
                    self.put(total, total[0] + term(j, piece * 32 + lane), 0)
                if extent % 32:
                    with tir.when(lane < extent % 32):
                        self.put(total, total[0] + term(j, extent // 32 * 32 + lane), 0)
                self.warp_sum(total)
                store(j, total[0])

    def _full(
        self,
        row: Any,
        cluster: Any,
        warp: Any,
        lane: Any,
        place: Callable[[Any], tuple[Any, tuple[Any, ...]]],
    ) -> None:
        """A full map: a warp for each class; ``place(j)`` is the buffer and the indices that take the result."""
        spec, arg = self.spec, self.arg

        def store(j: Any, value: Any) -> None:
            with tir.when(lane == 0):
                z = arg["logits"][row, j].astype("float32")
                buffer, indices = place(j)
                self.put(
                    buffer, self.blend(z, value + arg["beta"][cluster, j]).astype(buffer.dtype), *indices
                )

        self._each_sum(
            warp,
            lane,
            spec.n_classes,
            spec.width,
            lambda j, c: self.source(row, c) * arg["weight"][cluster, j, c],
            store,
        )
