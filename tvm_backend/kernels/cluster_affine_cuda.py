"""The cluster-affine step on a CUDA device: two kernels, between which the batch size decides.

*Few rows*: a block of eight warps for each row.  A warp sums along the contiguous axis of one component or centroid
at a time, so that loads coalesce; shuffles finish the sums.

*Many rows*: a block of eight warps for 32 rows.  The projection (or, without one, the distances) is a tiled product
whose long axis is shared among the warps: each warp holds the whole 32 x 64 tile of sums in registers, sees an eighth of
each chunk, and the eight tiles are added at the end.  The next chunk is on its way from memory while the warps
multiply.  Distances, argmin and the affine map then go by rows, four to a warp.

Rows are read twice and written once; the second reading comes from the second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from cat_plugin.errors import CompileError
from tvm_backend.kernels.cluster_affine_spec import OPS, ClusterAffineSpec

__all__ = ["FEW_ROWS", "build", "fits_tile"]

FEW_ROWS = 264
"""Up to two blocks for each of an H100's 132 multiprocessors, a row has a block of its own."""

_WARPS = 8
_THREADS = 32 * _WARPS
_ROWS = 32
_CHUNK = 64
_PITCH = _CHUNK + 4  # keeps 16-byte alignment and spreads eight rows over all banks
_SHARED = 48 * 1024


def _columns(count: int) -> int:
    """Columns of a lane in a tile of sums; four lanes share a row."""
    return min(16, -(-count // 4))


def _pool(count: int) -> int:
    """float32 values of the shared buffer for chunks, later for partial tiles."""
    columns = _columns(count)
    return max((_ROWS + 4 * columns) * _PITCH, 4 * 32 * 4 * columns)


def fits_tile(spec: ClusterAffineSpec) -> bool:
    """Whether the kernel for many rows has room for the tile of sums in shared memory."""
    if spec.op == OPS[2]:
        return False
    count = spec.n_components or spec.n_clusters
    return 4 * (_pool(count) + _ROWS * (count | 1) + _ROWS * max(1, spec.rank) + _ROWS) <= _SHARED


@contextmanager
def _when(condition: Any) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


def _row_of(matrix: Any, row: Any) -> Callable[[Any], Any]:
    return lambda column: matrix[row, column]


class _Emitter:
    """What both kernels share: arguments, warp-wide sums and minima, the affine map of a row."""

    def __init__(self, spec: ClusterAffineSpec, arg: dict[str, Any], batch: Any) -> None:
        self.spec, self.arg, self.batch = spec, arg, batch
        # 16-byte loads need rows that start at 16 bytes.
        self.vector = 4 if spec.dtype == "float32" and spec.n_classes % 4 == 0 and not spec.n_features else 1

    def shared(self, extent: int, dtype: str = "float32") -> Any:
        """An array in shared memory."""
        return T.alloc_buffer((extent,), dtype, scope="shared")

    def local(self, extent: int, dtype: str = "float32") -> Any:
        """Registers; indices must be constants."""
        return T.alloc_buffer((extent,), dtype, scope="local")

    def put(self, buffer: Any, value: Any, *index: Any) -> None:
        """Assign."""
        T.buffer_store(buffer, value, list(index))

    def barrier(self) -> None:
        """Wait for all threads of the block."""
        T.evaluate(T.tvm_storage_sync("shared"))

    def exchanged(self, value: Any, distance: int, dtype: str) -> Any:
        """The value of the lane whose number differs in one bit."""
        return T.call_pure_extern(dtype, "__shfl_xor_sync", T.uint32(0xFFFFFFFF), value, distance)

    def warp_sum(self, held: Any, place: int = 0) -> None:
        """Replace a register by its sum over the warp, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            self.put(held, held[place] + self.exchanged(held[place], distance, "float32"), place)

    def warp_first_minimum(self, best: Any, index: Any, place: int = 0) -> None:
        """The smallest value of the warp and its index, the lowest among equals, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            value, other = self.local(1), self.local(1, "int32")
            self.put(value, self.exchanged(best[place], distance, "float32"), 0)
            self.put(other, self.exchanged(index[place], distance, "int32"), 0)
            equal = T.And(value[0] == best[place], other[0] < index[place])
            closer = T.Or(value[0] < best[place], equal)
            self.put(index, T.Select(closer, other[0], index[place]), place)
            self.put(best, T.min(value[0], best[place]), place)

    def scan(self, best: Any, index: Any, lane: Any, value: Callable[[Any], Any], place: int = 0) -> None:
        """The first minimum over all clusters of ``value(k)``."""
        clusters = self.spec.n_clusters
        self.put(best, T.float32(float("inf")), place)
        # In range even if no comparison holds.
        self.put(index, T.min(lane, T.int32(clusters - 1)), place)
        with T.serial(-(-clusters // 32)) as step, _when(step * 32 + lane < clusters):
            found = self.local(1)
            self.put(found, value(step * 32 + lane), 0)
            self.put(index, T.Select(found[0] < best[place], step * 32 + lane, index[place]), place)
            self.put(best, T.min(best[place], found[0]), place)
        self.warp_first_minimum(best, index, place)

    def source(self, row: Any, column: Any) -> Any:
        """One value of the input in float32, features behind logits."""
        value = self.arg["logits"][row, column].astype("float32")
        if not self.spec.n_features:
            return value
        behind = T.max(column - self.spec.n_classes, 0)
        feature = self.arg["features"][row, behind].astype("float32")
        inside = self.arg["logits"][row, T.min(column, self.spec.n_classes - 1)].astype("float32")
        return T.if_then_else(column < self.spec.n_classes, inside, feature)

    def blend(self, z: Any, mapped: Any) -> Any:
        """The result, in the dtype of the logits."""
        return (z + T.float32(self.spec.alpha) * (mapped - z)).astype(self.spec.dtype)

    def map_row(
        self, row: Any, cluster: Any, thread: Any, threads: int, reduced: Callable[[Any], Any] | None
    ) -> None:
        """The diagonal map of a row, plus the low-rank term, by `threads` threads."""
        spec, arg, width = self.spec, self.arg, self.vector
        total, logits = self.local(width), self.local(width)
        with T.serial(-(-spec.n_classes // (threads * width))) as step:
            start = (step * threads + thread) * width
            with _when(start < spec.n_classes):

                def each(buffer: Any, value: Callable[[Any], Any]) -> None:
                    with T.vectorized(width) as v:
                        self.put(buffer, value(v), v)

                each(logits, lambda v: arg["logits"][row, start + v].astype("float32"))
                each(total, lambda v: arg["gamma"][cluster, start + v])
                each(total, lambda v: total[v] * logits[v] + arg["beta"][cluster, start + v])
                if reduced is not None:
                    with T.serial(spec.rank) as i:
                        each(total, lambda v: total[v] + reduced(i) * arg["right"][i, start + v])
                with T.vectorized(width) as v:
                    self.put(arg["output"], self.blend(logits[v], total[v]), row, start + v)


class _RowKernel(_Emitter):
    """A block for each row."""

    def emit(self) -> None:
        spec, arg, d = self.spec, self.arg, self.spec.n_components
        with (
            T.launch_thread("blockIdx.x", self.batch) as row,
            T.launch_thread("threadIdx.x", _THREADS) as thread,
        ):
            warp, lane = thread // 32, thread % 32
            inputs, cluster = self.shared(spec.width), self.shared(1, "int32")
            distance = self.shared(spec.n_clusters)
            points = self.shared(d) if d else inputs
            with T.serial(-(-spec.width // _THREADS)) as step:
                column = step * _THREADS + thread
                with _when(column < spec.width):
                    value = self.source(row, column)
                    self.put(inputs, value - arg["mean"][column] if d else value, column)
            self.barrier()
            if d:
                self._sums(
                    warp, lane, d, spec.width, points, lambda j, c: inputs[c] * arg["components"][j, c]
                )
                self.barrier()

            def squared(j: Any, c: Any) -> Any:
                difference = points[c] - arg["centroids"][j, c]
                return difference * difference

            self._sums(warp, lane, spec.n_clusters, spec.distance_width, distance, squared)
            self.barrier()
            with _when(warp == 0):
                best, index = self.local(1), self.local(1, "int32")
                self.scan(best, index, lane, lambda k: distance[k])
                with _when(lane == 0):
                    self.put(cluster, index[0], 0)
            self.barrier()
            if spec.op == OPS[2]:
                self._full(row, cluster[0], warp, lane)
                return
            reduced = self._reduced(points, cluster[0], warp, lane) if spec.rank else None
            term = None if reduced is None else reduced.__getitem__
            self.map_row(row, cluster[0], thread, _THREADS, term)

    def _sums(
        self, warp: Any, lane: Any, count: int, extent: int, result: Any, term: Callable[[Any, Any], Any]
    ) -> None:
        """``result[j] = sum_c term(j, c)`` for j < count, a warp for each j."""

        def store(j: Any, value: Any) -> None:
            with _when(lane == 0):
                self.put(result, value, j)

        self._each_sum(warp, lane, count, extent, term, store)

    def _reduced(self, points: Any, cluster: Any, warp: Any, lane: Any) -> Any:
        """``p @ core_k`` in shared memory."""
        spec, core = self.spec, self.arg["core"]
        steps = -(-spec.rank // _WARPS)
        totals, result = self.local(steps), self.shared(spec.rank)
        for step in range(steps):
            j = T.min(step * _WARPS + warp, spec.rank - 1)
            self.put(totals, T.float32(0), step)
            with T.serial(-(-spec.core_height // 32)) as piece, _when(piece * 32 + lane < spec.core_height):
                c = piece * 32 + lane
                self.put(totals, totals[step] + points[c] * core[cluster, c, j], step)
            self.warp_sum(totals, step)
        # TVM may give the result the memory of the points, which are not needed any more: wait for all readers.
        self.barrier()
        for step in range(steps):
            with _when(T.And(lane == 0, step * _WARPS + warp < spec.rank)):
                self.put(result, totals[step], step * _WARPS + warp)
        self.barrier()
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
        total = self.local(1)
        with T.serial(-(-count // _WARPS)) as step:
            j = step * _WARPS + warp
            with _when(j < count):
                self.put(total, T.float32(0), 0)
                with T.serial(extent // 32) as piece:
                    self.put(total, total[0] + term(j, piece * 32 + lane), 0)
                if extent % 32:
                    with _when(lane < extent % 32):
                        self.put(total, total[0] + term(j, extent // 32 * 32 + lane), 0)
                self.warp_sum(total)
                store(j, total[0])

    def _full(self, row: Any, cluster: Any, warp: Any, lane: Any) -> None:
        """A full map: a warp for each class."""
        spec, arg = self.spec, self.arg

        def store(j: Any, value: Any) -> None:
            with _when(lane == 0):
                z = arg["logits"][row, j].astype("float32")
                self.put(arg["output"], self.blend(z, value + arg["beta"][cluster, j]), row, j)

        self._each_sum(
            warp,
            lane,
            spec.n_classes,
            spec.width,
            lambda j, c: self.source(row, c) * arg["weight"][cluster, j, c],
            store,
        )


class _TileKernel(_Emitter):
    """A block for 32 rows."""

    def emit(self) -> None:
        spec, d = self.spec, self.spec.n_components
        count = d or spec.n_clusters
        blocks = (self.batch + _ROWS - 1) // _ROWS
        with (
            T.launch_thread("blockIdx.x", blocks) as block,
            T.launch_thread("threadIdx.x", _THREADS) as thread,
        ):
            self.first, self.thread = block * _ROWS, thread
            self.warp, self.lane = thread // 32, thread % 32
            self.pool = self.shared(_pool(count))
            self.pitch = count | 1
            self.result = self.shared(_ROWS * self.pitch)
            operand = self.arg["components"] if d else self.arg["centroids"]
            for start in range(0, count, 64):
                self._tile(start, min(64, count - start), operand, squared=not d)
            cluster = self._nearest() if d else self._nearest_of_tile()
            reduced = self._reduced(cluster) if spec.rank else None
            self._map_rows(cluster, reduced)

    def row(self, index: Any) -> Any:
        """A row of the batch; behind its end the last one, which is not stored again."""
        return T.min(self.first + index, self.batch - 1)

    def _tile(self, start: int, count: int, operand: Any, squared: bool) -> None:
        """``result[r, start + j]`` for 32 rows and `count` columns."""
        columns, spec = _columns(count), self.spec
        width = spec.n_classes
        sums = self.local(4 * columns)
        for i in range(4 * columns):
            self.put(sums, T.float32(0), i)
        loads = -(-count // 16)
        rows, others = self.local(8), self.local(4 * loads)
        group, offset = self.thread // 16, self.thread % 16 * 4
        second = _ROWS * _PITCH

        def fetch(chunk: Any) -> None:
            column = chunk * _CHUNK + offset
            for i in range(2):
                self._fetch(rows, 4 * i, column, width, self._centred(self.row(group + 16 * i), not squared))
            for i in range(loads):
                # Behind the last column any row will do: its sums are not used.
                j = T.min(start + group + 16 * i, start + count - 1)
                self._fetch(others, 4 * i, column, width, _row_of(operand, j))

        fetch(0)
        chunks = -(-width // _CHUNK)
        with T.serial(chunks) as chunk:
            self.barrier()
            for i in range(2):
                self._deposit(rows, 4 * i, (group + 16 * i) * _PITCH + offset)
            for i in range(loads):
                with _when(group + 16 * i < 4 * columns):
                    self._deposit(others, 4 * i, second + (group + 16 * i) * _PITCH + offset)
            self.barrier()
            with _when(chunk + 1 < chunks):
                fetch(chunk + 1)
            for step in range(_CHUNK // _WARPS // 4):
                self._multiply(sums, columns, self.warp * (_CHUNK // _WARPS) + 4 * step, second, squared)
        self._add_tiles(sums, columns)
        with _when(self.warp == 0):
            for i in range(4):
                for j in range(columns):
                    column = self.lane % 4 + 4 * j
                    with _when(column < count):
                        place = (self.lane // 4 + 8 * i) * self.pitch + start + column
                        self.put(self.result, sums[i * columns + j], place)
        self.barrier()

    def _centred(self, row: Any, mean: bool) -> Callable[[Any], Any]:
        def value(column: Any) -> Any:
            logit = self.arg["logits"][row, column].astype("float32")
            return logit - self.arg["mean"][column] if mean else logit

        return value

    def _fetch(self, held: Any, place: int, column: Any, width: int, value: Callable[[Any], Any]) -> None:
        """Four consecutive values into registers, zero behind the row's end."""
        if self.vector == 4:
            with T.If(column < width):
                with T.Then(), T.vectorized(4) as v:
                    self.put(held, value(column + v), place + v)
                with T.Else(), T.vectorized(4) as v:
                    self.put(held, T.float32(0), place + v)
            return
        for v in range(4):
            self.put(held, T.if_then_else(column + v < width, value(column + v), T.float32(0)), place + v)

    def _deposit(self, held: Any, place: int, where: Any) -> None:
        with T.vectorized(4) as v:
            self.put(self.pool, held[place + v], where + v)

    def _multiply(self, sums: Any, columns: int, k: Any, second: int, squared: bool) -> None:
        """Four steps along the long axis: four rows by `columns` columns for each lane."""
        left, right = self.local(16), self.local(4)
        for i in range(4):
            with T.vectorized(4) as v:
                self.put(left, self.pool[(self.lane // 4 + 8 * i) * _PITCH + k + v], 4 * i + v)
        for j in range(columns):
            with T.vectorized(4) as v:
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
            self.barrier()
            with _when(T.And(self.warp >= half, self.warp < 2 * half)):
                for i in range(size):
                    self.put(self.pool, sums[i], ((self.warp - half) * size + i) * 32 + self.lane)
            self.barrier()
            with _when(self.warp < half):
                for i in range(size):
                    self.put(sums, sums[i] + self.pool[(self.warp * size + i) * 32 + self.lane], i)
        self.barrier()

    def _nearest_of_tile(self) -> Any:
        """Clusters of the warp's four rows when the tile holds distances."""
        best, index = self.local(1), self.local(4, "int32")
        for i in range(4):
            row = self.warp * 4 + i
            held = self.local(1, "int32")
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
            with T.serial(-(-clusters * width // _THREADS)) as step:
                place = step * _THREADS + self.thread
                with _when(place < clusters * width):
                    k, i = place // width, place % width
                    self.put(self.pool, centroids[k, i], k * pitch + i)
            self.barrier()
        best, index = self.local(4), self.local(4, "int32")
        for i in range(4):
            self.put(best, T.float32(float("inf")), i)
            self.put(index, T.min(self.lane, T.int32(clusters - 1)), i)
        with T.serial(-(-clusters // 32)) as step, _when(step * 32 + self.lane < clusters):
            k = step * 32 + self.lane
            sums, centroid = self.local(4), self.local(1)
            for i in range(4):
                self.put(sums, T.float32(0), i)
            with T.serial(width) as c:
                self.put(centroid, self.pool[k * pitch + c] if staged else centroids[k, c], 0)
                for i in range(4):
                    difference = self.result[(self.warp * 4 + i) * self.pitch + c] - centroid[0]
                    self.put(sums, sums[i] + difference * difference, i)
            for i in range(4):
                self.put(index, T.Select(sums[i] < best[i], k, index[i]), i)
                self.put(best, T.min(best[i], sums[i]), i)
        for i in range(4):
            self.warp_first_minimum(best, index, i)
        return index

    def _reduced(self, cluster: Any) -> Any:
        """``p @ core_k`` of the warp's four rows, in shared memory."""
        spec, core = self.spec, self.arg["core"]
        reduced = self.shared(_ROWS * spec.rank)
        # TVM may give it the memory of the pool, from which other warps still read centroids.
        self.barrier()
        for i in range(4):
            row = self.warp * 4 + i
            with T.serial(-(-spec.rank // 32)) as step, _when(step * 32 + self.lane < spec.rank):
                j = step * 32 + self.lane
                total = self.local(1)
                self.put(total, T.float32(0), 0)
                with T.serial(spec.core_height) as c:
                    value = (
                        self.result[row * self.pitch + c]
                        if spec.n_components
                        else self.arg["logits"][self.row(row), c].astype("float32")
                    )
                    self.put(total, total[0] + value * core[cluster[i], c, j], 0)
                self.put(reduced, total[0], row * spec.rank + j)
        self.barrier()
        return reduced

    def _map_rows(self, cluster: Any, reduced: Any) -> None:
        for i in range(4):
            row = self.warp * 4 + i
            term = None
            if reduced is not None:
                term = self._reduced_term(reduced, row)
            with _when(self.first + row < self.batch):
                self.map_row(self.first + row, cluster[i], self.lane, 32, term)

    def _reduced_term(self, reduced: Any, row: Any) -> Callable[[Any], Any]:
        return lambda i: reduced[row * self.spec.rank + i]


def build(spec: ClusterAffineSpec) -> PrimFunc:
    """Write the function.

    Parameters
    ----------
    spec : ClusterAffineSpec
        What to compute.

    Returns
    -------
    tvm.tirx.PrimFunc
        Private; arguments as in :meth:`ClusterAffineSpec.arguments`.

    Raises
    ------
    CompileError
        A finish that only the CPU function has, or a row that does not fit into shared memory.
    """
    if spec.finish != "logits":
        raise CompileError(
            f"finish={spec.finish!r} is fused on CPU targets only; use finish='logits' for CUDA"
        )
    need = 4 * (spec.width + spec.n_clusters + spec.n_components + spec.rank + 1)
    if need > _SHARED:
        raise CompileError(
            f"a row of {spec.width} values with {spec.n_clusters} distances takes {need} bytes of shared memory; "
            f"the CUDA kernel has {_SHARED}"
        )
    with IRBuilder() as builder, T.prim_func(s_tir=True, private=True):
        batch = T.int64() if spec.batch is None else spec.batch
        arg = {}
        for name, shape, dtype in spec.arguments():
            arg[name] = T.arg(
                name, T.buffer([batch if extent is None else extent for extent in shape], dtype)
            )
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        tile = fits_tile(spec)
        if spec.batch is not None or not tile:
            many = tile and spec.batch is not None and spec.batch > FEW_ROWS
            (_TileKernel if many else _RowKernel)(spec, arg, batch).emit()
        else:
            with T.If(batch <= FEW_ROWS):
                with T.Then():
                    _RowKernel(spec, arg, batch).emit()
                with T.Else():
                    _TileKernel(spec, arg, batch).emit()
    return builder.get()
