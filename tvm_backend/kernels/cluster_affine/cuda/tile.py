"""The cluster-affine step on CUDA for many rows: 32 rows a block, the projection as a tiled product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine.cuda.emitter import SHARED, THREADS, WARPS
from tvm_backend.kernels.cluster_affine.cuda.finish import FinishingEmitter
from tvm_backend.kernels.cluster_affine.spec import ClusterAffineSpec
from tvm_backend.kernels.cuda import device

__all__ = ["TileKernel", "fits_tile"]

_ROWS = 32
_CHUNK = 64
_PITCH = _CHUNK + 4  # keeps 16-byte alignment and spreads eight rows over all banks


def _columns(count: int) -> int:
    """Columns of a lane in a tile of sums; four lanes share a row."""
    return min(16, -(-count // 4))


def _pool(count: int) -> int:
    """float32 values of the shared buffer for chunks, later for partial tiles."""
    columns = _columns(count)
    return max((_ROWS + 4 * columns) * _PITCH, 4 * 32 * 4 * columns)


def fits_tile(spec: ClusterAffineSpec) -> bool:
    """Whether the kernel for many rows has room for the tile of sums in shared memory."""
    if spec.has("weight"):
        return False
    count = spec.n_components or spec.n_clusters
    return 4 * (_pool(count) + _ROWS * (count | 1) + _ROWS * max(1, spec.rank) + _ROWS) <= SHARED


def _row_of(matrix: Any, row: Any) -> Callable[[Any], Any]:
    return lambda column: matrix[row, column]


class TileKernel(FinishingEmitter):
    """A block for 32 rows."""

    def emit(self) -> None:
        """Write the whole body."""
        spec, d = self.spec, self.spec.n_components
        count = d or spec.n_clusters
        blocks = (self.batch + _ROWS - 1) // _ROWS
        with device.threads([blocks], THREADS) as ((block,), thread):
            self.first, self.thread = block * _ROWS, thread
            self.warp, self.lane = thread // 32, thread % 32
            self.pool = device.shared(_pool(count))
            self.pitch = count | 1
            self.result = device.shared(_ROWS * self.pitch)
            operand = self.arg["components"] if d else self.arg["centroids"]
            for start in range(0, count, 64):
                self._tile(start, min(64, count - start), operand, squared=not d)
            cluster = self._nearest() if d else self._nearest_of_tile()
            reduced = self._reduced(cluster) if spec.rank else None
            self._map_rows(cluster, reduced)

    def row(self, index: Any) -> Any:
        """A row of the batch; behind its end the last one, which is not stored again."""
        return tir.smaller(self.first + index, self.batch - 1)

    def _tile(self, start: int, count: int, operand: Any, squared: bool) -> None:
        """``result[r, start + j]`` for 32 rows and `count` columns."""
        columns, spec = _columns(count), self.spec
        width = spec.n_classes
        sums = device.local(4 * columns)
        for i in range(4 * columns):
            self.put(sums, tir.float32(0), i)
        loads = -(-count // 16)
        rows, others = device.local(8), device.local(4 * loads)
        group, offset = self.thread // 16, self.thread % 16 * 4
        second = _ROWS * _PITCH

        def fetch(chunk: Any) -> None:
            column = chunk * _CHUNK + offset
            for i in range(2):
                self._fetch(rows, 4 * i, column, width, self._centred(self.row(group + 16 * i), not squared))
            for i in range(loads):
                # Behind the last column any row will do: its sums are not used.
                j = tir.smaller(start + group + 16 * i, start + count - 1)
                self._fetch(others, 4 * i, column, width, _row_of(operand, j))

        fetch(0)
        chunks = -(-width // _CHUNK)
        with tir.loop(chunks) as chunk:
            device.barrier()
            for i in range(2):
                self._deposit(rows, 4 * i, (group + 16 * i) * _PITCH + offset)
            for i in range(loads):
                with tir.when(group + 16 * i < 4 * columns):
                    self._deposit(others, 4 * i, second + (group + 16 * i) * _PITCH + offset)
            device.barrier()
            with tir.when(chunk + 1 < chunks):
                fetch(chunk + 1)
            for step in range(_CHUNK // WARPS // 4):
                self._multiply(sums, columns, self.warp * (_CHUNK // WARPS) + 4 * step, second, squared)
        self._add_tiles(sums, columns)
        with tir.when(self.warp == 0):
            for i in range(4):
                for j in range(columns):
                    column = self.lane % 4 + 4 * j
                    with tir.when(column < count):
                        place = (self.lane // 4 + 8 * i) * self.pitch + start + column
                        self.put(self.result, sums[i * columns + j], place)
        device.barrier()

    def _centred(self, row: Any, mean: bool) -> Callable[[Any], Any]:
        def value(column: Any) -> Any:
            logit = self.arg["logits"][row, column].astype("float32")
            return logit - self.arg["mean"][column] if mean else logit

        return value

    def _fetch(self, held: Any, place: int, column: Any, width: int, value: Callable[[Any], Any]) -> None:
        """Four consecutive values into registers, zero behind the row's end."""
        if self.vector == 4:
            with tir.choose(column < width) as (inside, behind):
                with inside, tir.vectorized(4) as v:
                    self.put(held, value(column + v), place + v)
                with behind, tir.vectorized(4) as v:
                    self.put(held, tir.float32(0), place + v)
            return
        for v in range(4):
            self.put(held, tir.if_else(column + v < width, value(column + v), tir.float32(0)), place + v)

    def _deposit(self, held: Any, place: int, where: Any) -> None:
        with tir.vectorized(4) as v:
            self.put(self.pool, held[place + v], where + v)

    def _multiply(self, sums: Any, columns: int, k: Any, second: int, squared: bool) -> None:
        """Four steps along the long axis: four rows by `columns` columns for each lane."""
        left, right = device.local(16), device.local(4)
        for i in range(4):
            with tir.vectorized(4) as v:
                self.put(left, self.pool[(self.lane // 4 + 8 * i) * _PITCH + k + v], 4 * i + v)
        for j in range(columns):
            with tir.vectorized(4) as v:
                self.put(right, self.pool[second + (self.lane % 4 + 4 * j) * _PITCH + k + v], v)
            for i in range(4):
                for v in range(4):
                    a, b, place = left[4 * i + v], right[v], i * columns + j
                    term = (a - b) * (a - b) if squared else a * b
                    self.put(sums, sums[place] + term, place)

    def _add_tiles(self, sums: Any, columns: int) -> None:
        """Add the warps' tiles of sums, half of the warps to the other half at a time."""
        size = 4 * columns
        for half in (4, 2, 1):
            device.barrier()
            with tir.when(tir.all_of(self.warp >= half, self.warp < 2 * half)):
                for i in range(size):
                    self.put(self.pool, sums[i], ((self.warp - half) * size + i) * 32 + self.lane)
            device.barrier()
            with tir.when(self.warp < half):
                for i in range(size):
                    self.put(sums, sums[i] + self.pool[(self.warp * size + i) * 32 + self.lane], i)
        device.barrier()

    def _nearest_of_tile(self) -> Any:
        """Clusters of the warp's four rows when the tile holds distances."""
        best, index = device.local(1), device.local(4, "int32")
        for i in range(4):
            row = self.warp * 4 + i
            held = device.local(1, "int32")
            self.scan(best, held, self.lane, self._distances_of(row))
            self.put(index, held[0], i)
        return index

    def _distances_of(self, row: Any) -> Callable[[Any], Any]:
        return lambda k: self.result[row * self.pitch + k]

    def _nearest(self) -> Any:
        """Clusters of the warp's four rows from their projections: a centroid for each lane."""
        spec, centroids = self.spec, self.arg["centroids"]
        clusters, width = spec.n_clusters, spec.distance_width
        pitch = width | 1
        staged = clusters * pitch <= _pool(spec.n_components)
        if staged:
            with tir.loop(-(-clusters * width // THREADS)) as step:
                place = step * THREADS + self.thread
                with tir.when(place < clusters * width):
                    k, i = place // width, place % width
                    self.put(self.pool, centroids[k, i], k * pitch + i)
            device.barrier()
        best, index = device.local(4), device.local(4, "int32")
        for i in range(4):
            self.put(best, tir.float32(float("inf")), i)
            self.put(index, tir.smaller(self.lane, tir.int32(clusters - 1)), i)
        with tir.loop(-(-clusters // 32)) as step, tir.when(step * 32 + self.lane < clusters):
            k = step * 32 + self.lane
            sums, centroid = device.local(4), device.local(1)
            for i in range(4):
                self.put(sums, tir.float32(0), i)
            with tir.loop(width) as c:
                self.put(centroid, self.pool[k * pitch + c] if staged else centroids[k, c], 0)
                for i in range(4):
                    difference = self.result[(self.warp * 4 + i) * self.pitch + c] - centroid[0]
                    self.put(sums, sums[i] + difference * difference, i)
            for i in range(4):
                self.put(index, tir.select(sums[i] < best[i], k, index[i]), i)
                self.put(best, tir.smaller(best[i], sums[i]), i)
        for i in range(4):
            self.warp_first_minimum(best, index, i)
        return index

    def _reduced(self, cluster: Any) -> Any:
        """``p @ core_k`` of the warp's four rows, in shared memory."""
        spec, core = self.spec, self.arg["core"]
        reduced = device.shared(_ROWS * spec.rank)
        # TVM may give it the memory of the pool, from which other warps still read centroids.
        device.barrier()
        for i in range(4):
            row = self.warp * 4 + i
            with tir.loop(-(-spec.rank // 32)) as step, tir.when(step * 32 + self.lane < spec.rank):
                j = step * 32 + self.lane
                total = device.local(1)
                self.put(total, tir.float32(0), 0)
                with tir.loop(spec.core_height) as c:
                    value = (
                        self.result[row * self.pitch + c]
                        if spec.n_components
                        else self.arg["logits"][self.row(row), c].astype("float32")
                    )
                    self.put(total, total[0] + value * core[cluster[i], c, j], 0)
                self.put(reduced, total[0], row * spec.rank + j)
        device.barrier()
        return reduced

    def _map_rows(self, cluster: Any, reduced: Any) -> None:
        for i in range(4):
            row = self.warp * 4 + i
            term = None
            if reduced is not None:
                term = self._reduced_term(reduced, row)
            with tir.when(self.first + row < self.batch):
                self._map_row(self.first + row, cluster[i], term)

    def _map_row(self, row: Any, cluster: Any, term: Callable[[Any], Any] | None) -> None:
        if self.spec.finish == "logits":
            self.map_row(row, cluster, self.lane, 32, term)
            return
        # 32 corrected rows are more than shared memory holds: they are computed again for each reading.
        self.finish_row(row, lambda c: self.corrected(row, cluster, c, term), self.lane, self.lane, 32)

    def _reduced_term(self, reduced: Any, row: Any) -> Callable[[Any], Any]:
        return lambda i: reduced[row * self.spec.rank + i]
