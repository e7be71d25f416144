"""The cluster-affine step on a CPU: one PrimFunc, scheduled as it is written.

Rows go in blocks, so that a vector of the components that comes from the second-level cache is used for several
rows; sums run in vectors along the contiguous axis of every operand (no operand is transposed or copied) and are
folded by a tree, which takes the tail of a row without masks.  A block's rows lie in the first-level cache until
the last step.  Threads share the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from tvm_backend.kernels.cluster_affine_spec import OPS, ClusterAffineSpec

__all__ = ["CpuShape", "build"]

Load = Callable[[Any], Any]


class CpuShape:
    """Sizes of the register blocks.

    Parameters
    ----------
    lanes : int
        float32 values of a vector register.
    rows : int
        Rows of a block.
    columns : int
        Components or centroids that a block's rows meet at once; ``rows * columns`` vectors are accumulated.
    """

    def __init__(self, lanes: int, rows: int, columns: int) -> None:
        self.lanes, self.rows, self.columns = lanes, rows, columns

    @classmethod
    def for_target(cls, target: Any) -> CpuShape:
        """Choose by the vector extension that a target's processor has.

        Parameters
        ----------
        target : tvm.target.Target or None
            None gives a shape that suits 32 registers of four lanes.
        """
        from tvm.target import codegen

        if target is not None and target.kind.name == "llvm":
            with target:
                if codegen.llvm_cpu_has_features("avx512f"):
                    return cls(16, 8, 3)
                if codegen.llvm_cpu_has_features("avx2"):
                    return cls(8, 4, 3)
        return cls(4, 4, 4)


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class _Emitter:
    """Writes the function for one specification, statement by statement, into the current builder."""

    def __init__(self, spec: ClusterAffineSpec, shape: CpuShape) -> None:
        self.spec, self.shape = spec, shape
        self.arg: dict[str, Any] = {}

    # Pieces -----------------------------------------------------------------------------------------------------

    def _local(self, extent: int, dtype: str = "float32") -> Any:
        return T.alloc_buffer((extent,), dtype, scope="local")

    def _vector(
        self, buffer: Any, indices: Callable[[Any], list[Any]], value: Callable[[Any], Any], n: int
    ) -> None:
        """``buffer[indices(i)] = value(i)`` for n lanes."""
        if n == 1:
            T.buffer_store(buffer, value(0), indices(0))
            return
        with T.vectorized(n) as lane:
            T.buffer_store(buffer, value(lane), indices(lane))

    def _chunks(self, extent: int, body: Callable[[Any, int], None], vectors: int = 1) -> None:
        """Call ``body(offset, width)`` for a loop over whole vectors and for the powers of two in the tail."""
        lanes = self.shape.lanes * vectors
        if extent >= lanes:
            with T.serial(extent // lanes) as chunk:
                body(chunk * lanes, lanes)
        offset, width = extent // lanes * lanes, lanes // 2
        while width:
            if extent % lanes & width:
                body(offset, width)
                offset += width
            width //= 2

    def _sums(
        self,
        rows: int,
        count: int,
        extent: int,
        term: Callable[[int, Any, Any, Any], Any],
        store: Callable[[int, Any, Any], None],
    ) -> None:
        """``store(r, j, sum_c term(r, j, c))`` for all rows r of the block and j < count.

        ``term(r, j, c, total)`` returns the total plus one term.
        """
        wanted = max(1, self.shape.rows * self.shape.columns // rows)
        blocks = _ceil(count, wanted) // wanted
        columns = _ceil(count, blocks) // blocks
        if count >= columns:
            with T.serial(count // columns) as block:
                self._sums_block(rows, block * columns, columns, extent, term, store)
        if count % columns:
            self._sums_block(rows, count // columns * columns, count % columns, extent, term, store)

    def _sums_block(
        self,
        rows: int,
        first: Any,
        columns: int,
        extent: int,
        term: Callable[..., Any],
        store: Callable[..., None],
    ) -> None:
        lanes = self.shape.lanes
        pairs = [(r, j, self._local(lanes)) for j in range(columns) for r in range(rows)]
        for _, _, total in pairs:
            self._vector(total, lambda v: [v], lambda v: T.float32(0), lanes)
        if extent >= lanes:
            with T.serial(extent // lanes) as chunk:
                for r, j, total in pairs:
                    self._vector(
                        total,
                        lambda v: [v],
                        lambda v, r=r, j=j, total=total: term(r, first + j, chunk * lanes + v, total[v]),
                        lanes,
                    )
        # Fold to half the lanes; the piece of the tail that is as wide joins in; and so on.  Each width has a
        # buffer of its own, so that all of them become registers.
        offset, width = extent // lanes * lanes, lanes // 2
        while width:
            halves = []
            for r, j, total in pairs:
                half = self._local(width)
                vector = total[T.ramp(0, 1, 2 * width)]
                dtype = f"float32x{width}" if width > 1 else "float32"
                low, high = T.vectorlow(dtype, vector), T.vectorhigh(dtype, vector)
                if width == 1:
                    low, high = total[0], total[1]
                T.buffer_store(half, low + high, [T.ramp(0, 1, width) if width > 1 else 0])
                if extent % lanes & width:
                    self._vector(
                        half,
                        lambda v: [v],
                        lambda v, r=r, j=j, t=half, o=offset: term(r, first + j, o + v, t[v]),
                        width,
                    )
                halves.append((r, j, half))
            if extent % lanes & width:
                offset += width
            pairs, width = halves, width // 2
        for r, j, total in pairs:
            store(r, first + j, total[0])

    # Steps ------------------------------------------------------------------------------------------------------

    def _load(self, inputs: Any, row: Any, r: int, mean: bool) -> None:
        """Copy a row to float32, centred if it is to be projected."""
        spec = self.spec
        for name, start, extent in (
            ("logits", 0, spec.n_classes),
            ("features", spec.n_classes, spec.n_features),
        ):
            if not extent:
                continue
            source = self.arg[name]

            def body(offset: Any, width: int, source: Any = source, start: int = start) -> None:
                def value(v: Any) -> Any:
                    x = source[row, offset + v].astype("float32")
                    return x - self.arg["mean"][start + offset + v] if mean else x

                self._vector(inputs, lambda v: [r, start + offset + v], value, width)

            self._chunks(extent, body)
        # Whole vectors to the end of a row keep the next row aligned.
        for column in range(spec.width, _ceil(spec.width, self.shape.lanes)):
            T.buffer_store(inputs, T.float32(0), [r, column])

    def _smallest(self, value: Callable[[Any], Any], extent: int, result: Callable[[Any, Any], None]) -> None:
        """``result(i, value(i))`` for the smallest of `extent` values, the lowest index among equals.

        `value` is read up to the next whole vector; what lies there must be +inf.
        """
        lanes = self.shape.lanes
        best, index = self._local(lanes), self._local(lanes, "int32")
        self._vector(best, lambda v: [v], value, lanes)
        # An index stays in range when no comparison holds, as with NaN.
        self._vector(
            index,
            lambda v: [v],
            lambda v: T.Select(T.cast(v, "int32") < extent, T.cast(v, "int32"), T.int32(0)),
            lanes,
        )
        chunks = _ceil(extent, lanes) // lanes - 1
        with T.serial(chunks) if chunks > 8 else T.unroll(chunks) as chunk:
            start = (chunk + 1) * lanes
            self._vector(
                index,
                lambda v: [v],
                lambda v: T.Select(value(start + v) < best[v], T.cast(start + v, "int32"), index[v]),
                lanes,
            )
            self._vector(best, lambda v: [v], lambda v: T.min(best[v], value(start + v)), lanes)
        width = lanes // 2
        while width:

            def pick(v: Any, w: int = width) -> Any:
                closer = T.Or(best[v + w] < best[v], T.And(best[v + w] == best[v], index[v + w] < index[v]))
                return T.Select(closer, index[v + w], index[v])

            self._vector(index, lambda v: [v], pick, width)
            self._vector(best, lambda v: [v], lambda v, w=width: T.min(best[v], best[v + w]), width)
            width //= 2
        result(index[0], best[0])

    def block(self, first: Any, rows: int) -> None:
        """All of the step for `rows` rows from `first` on."""
        spec, lanes = self.spec, self.shape.lanes
        arg, d = self.arg, spec.n_components
        inputs = T.alloc_buffer((rows, _ceil(spec.width, lanes)), "float32")
        for r in range(rows):
            self._load(inputs, first + r, r, mean=d > 0)
        points = inputs
        if d:
            points = T.alloc_buffer((rows, _ceil(d, lanes)), "float32")
            self._sums(
                rows,
                d,
                spec.width,
                lambda r, j, c, total: total + inputs[r, c] * arg["components"][j, c],
                lambda r, j, value: T.buffer_store(points, value, [r, j]),
            )
        distance = T.alloc_buffer((rows, _ceil(spec.n_clusters, lanes)), "float32")
        self._pad(distance, rows, spec.n_clusters, float("inf"))

        def squared(r: int, j: Any, c: Any, total: Any) -> Any:
            difference = points[r, c] - arg["centroids"][j, c]
            return total + difference * difference

        self._sums(
            rows,
            spec.n_clusters,
            spec.distance_width,
            squared,
            lambda r, j, value: T.buffer_store(distance, value, [r, j]),
        )
        cluster = T.alloc_buffer((rows,), "int32")
        for r in range(rows):
            self._smallest(
                lambda v, r=r: distance[r, v],
                spec.n_clusters,
                lambda index, _, r=r: T.buffer_store(cluster, index, [r]),
            )
        with T.serial(rows) as r:
            self._correct(first + r, r, cluster[r], points)

    def _pad(self, buffer: Any, rows: int, extent: int, value: float) -> None:
        """Fill the part of each row behind `extent`."""
        for r in range(rows):
            for column in range(extent, int(buffer.shape[1])):
                T.buffer_store(buffer, T.float32(value), [r, column])

    def _correct(self, row: Any, r: Any, cluster: Any, points: Any) -> None:
        """Map one row with its cluster's parameters, blend and store."""
        spec, arg = self.spec, self.arg
        alpha = T.float32(spec.alpha)
        target, place, final = arg.get("output"), row, True
        if spec.finish != "logits":
            target = T.alloc_buffer((1, _ceil(spec.n_classes, self.shape.lanes)), "float32")
            place, final = 0, False

        def blend(c: Any, mapped: Any) -> Any:
            z = arg["logits"][row, c].astype("float32")
            y = z + alpha * (mapped - z)
            return y.astype(spec.dtype) if final else y

        if spec.op == OPS[2]:
            raw = T.alloc_buffer((1, _ceil(spec.width, self.shape.lanes)), "float32")
            self._load(raw, row, 0, mean=False)
            self._sums(
                1,
                spec.n_classes,
                spec.width,
                lambda _, j, c, total: total + raw[0, c] * arg["weight"][cluster, j, c],
                lambda _, j, value: T.buffer_store(
                    target, blend(j, value + arg["beta"][cluster, j]), [place, j]
                ),
            )
        else:
            lowrank = self._lowrank(r, cluster, points) if spec.op == OPS[1] else None

            def body(offset: Any, width: int) -> None:
                total = self._local(width)

                def diagonal(v: Any) -> Any:
                    z = arg["logits"][row, offset + v].astype("float32")
                    return arg["gamma"][cluster, offset + v] * z + arg["beta"][cluster, offset + v]

                if lowrank is None:
                    self._vector(
                        target,
                        lambda v: [place, offset + v],
                        lambda v: blend(offset + v, diagonal(v)),
                        width,
                    )
                    return
                self._vector(total, lambda v: [v], diagonal, width)
                with T.serial(spec.rank) as i:
                    self._vector(
                        total,
                        lambda v: [v],
                        lambda v: total[v] + lowrank[i] * arg["right"][i, offset + v],
                        width,
                    )
                self._vector(
                    target, lambda v: [place, offset + v], lambda v: blend(offset + v, total[v]), width
                )

            self._chunks(spec.n_classes, body, 4 if lowrank is not None else 1)
        if spec.finish == "softmax":
            self._softmax(row, target)
        elif spec.finish == "topk":
            self._largest(row, target)

    def _lowrank(self, r: Any, cluster: Any, points: Any) -> Any:
        """``points[r] @ core[cluster]``, r values."""
        spec, core = self.spec, self.arg["core"]
        result = T.alloc_buffer((spec.rank,), "float32")
        self._chunks(
            spec.rank,
            lambda offset, width: self._vector(result, lambda v: [offset + v], lambda v: T.float32(0), width),
        )
        with T.serial(spec.n_components) as i:
            self._chunks(
                spec.rank,
                lambda offset, width: self._vector(
                    result,
                    lambda v: [offset + v],
                    lambda v: result[offset + v] + points[r, i] * core[cluster, i, offset + v],
                    width,
                ),
            )
        return result

    def _softmax(self, row: Any, values: Any) -> None:
        """Store ``exp(v - max) / sum`` of a row."""
        spec, lanes, output = self.spec, self.shape.lanes, self.arg["output"]
        self._pad(values, 1, spec.n_classes, float("-inf"))
        largest, total = self._local(1), self._local(1)
        self._smallest(
            lambda v: T.float32(0) - values[0, v],
            spec.n_classes,
            lambda _, best: T.buffer_store(largest, T.float32(0) - best, [0]),
        )
        chunks = _ceil(spec.n_classes, lanes) // lanes
        partial = self._local(lanes)
        self._vector(partial, lambda v: [v], lambda v: T.float32(0), lanes)
        with T.serial(chunks) as chunk:
            self._vector(
                values,
                lambda v: [0, chunk * lanes + v],
                lambda v: T.exp(values[0, chunk * lanes + v] - largest[0]),
                lanes,
            )
            self._vector(partial, lambda v: [v], lambda v: partial[v] + values[0, chunk * lanes + v], lanes)
        width = lanes // 2
        while width:
            self._vector(partial, lambda v: [v], lambda v, w=width: partial[v] + partial[v + w], width)
            width //= 2
        T.buffer_store(total, T.float32(1) / partial[0], [0])
        self._chunks(
            spec.n_classes,
            lambda offset, width: self._vector(
                output,
                lambda v: [row, offset + v],
                lambda v: (values[0, offset + v] * total[0]).astype(spec.dtype),
                width,
            ),
        )

    def _largest(self, row: Any, values: Any) -> None:
        """Store the `top_k` largest values of a row and their places, by repeated search."""
        spec, arg = self.spec, self.arg
        self._pad(values, 1, spec.n_classes, float("-inf"))
        found = self._local(1, "int32")
        with T.serial(spec.top_k) as i:
            self._smallest(
                lambda v: T.float32(0) - values[0, v],
                spec.n_classes,
                lambda index, _: T.buffer_store(found, index, [0]),
            )
            T.buffer_store(arg["values"], values[0, found[0]].astype(spec.dtype), [row, i])
            T.buffer_store(arg["classes"], found[0].astype("int64"), [row, i])
            T.buffer_store(values, T.float32(float("-inf")), [0, found[0]])

    def function(self) -> None:
        """The whole function: declarations, then the blocks in parallel."""
        spec, rows = self.spec, self.shape.rows
        batch = T.int64() if spec.batch is None else spec.batch
        for name, shape, dtype in spec.arguments():
            extents = [batch if extent is None else extent for extent in shape]
            self.arg[name] = T.arg(name, T.buffer(extents, dtype))
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        if spec.batch is not None:
            self._blocks(spec.batch, rows)
            return
        with T.If(batch < rows):
            with T.Then(), T.serial(batch) as row:
                self.block(row, 1)
            with T.Else(), T.parallel(batch // rows + batch % rows) as task, T.If(task < batch // rows):
                with T.Then():
                    self.block(task * rows, rows)
                with T.Else():
                    self.block(batch // rows * rows + (task - batch // rows), 1)

    def _blocks(self, batch: int, rows: int) -> None:
        """A known number of rows."""
        blocks, rest = divmod(batch, rows)
        if blocks > 1:
            with T.parallel(blocks) as task:
                self.block(task * rows, rows)
        elif blocks:
            self.block(0, rows)
        if rest:
            self.block(blocks * rows, rest)


def build(spec: ClusterAffineSpec, shape: CpuShape) -> PrimFunc:
    """Write the function.

    Parameters
    ----------
    spec : ClusterAffineSpec
        What to compute.
    shape : CpuShape
        Sizes of the register blocks.

    Returns
    -------
    tvm.tirx.PrimFunc
        Private, as ``call_tir`` wants it; arguments as in :meth:`ClusterAffineSpec.arguments`.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True, private=True):
        _Emitter(spec, shape).function()
    return builder.get()
