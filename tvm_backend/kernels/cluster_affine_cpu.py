"""The cluster-affine step on a CPU: one PrimFunc, scheduled as it is written.

Rows go in blocks, so that a vector of the components that comes from the second-level cache is used for several
rows; sums run in vectors along the contiguous axis of every operand, so that no operand is transposed or copied.
A block's rows lie in the first-level cache until the last step.  Threads share the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from tvm_backend.kernels.cluster_affine_spec import OPS, ClusterAffineSpec
from tvm_backend.kernels.cluster_affine_vectors import Vectors, ceil_to

__all__ = ["CpuShape", "build"]


@dataclass(frozen=True)
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

    lanes: int
    rows: int
    columns: int

    @classmethod
    def for_target(cls, target: Any) -> CpuShape:
        """Choose by the vector extension that a target's processor has; measured for C = 1000, K = 64, d = 50.

        Parameters
        ----------
        target : tvm.target.Target or None
            None gives a shape that suits 32 registers of four lanes.
        """
        from tvm.target import codegen

        if target is not None and target.kind.name == "llvm":
            with target:
                if codegen.llvm_cpu_has_features("avx512f"):
                    return cls(16, 4, 4)
                if codegen.llvm_cpu_has_features("avx2"):
                    return cls(8, 4, 2)
        return cls(4, 4, 4)


class _Emitter:
    """Writes the function for one specification, statement by statement, into the current builder."""

    def __init__(self, spec: ClusterAffineSpec, shape: CpuShape) -> None:
        self.spec, self.rows = spec, shape.rows
        self.vectors = Vectors(shape.lanes, shape.rows * shape.columns)
        self.arg: dict[str, Any] = {}

    def function(self) -> None:
        """The whole function: declarations, then the blocks in parallel."""
        spec, rows = self.spec, self.rows
        batch = T.int64() if spec.batch is None else spec.batch
        for name, shape, dtype in spec.arguments():
            extents = [batch if extent is None else extent for extent in shape]
            self.arg[name] = T.arg(name, T.buffer(extents, dtype))
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        if spec.batch is not None:
            blocks, rest = divmod(spec.batch, rows)
            if blocks:
                with T.parallel(blocks) if blocks > 1 else T.serial(1) as task:
                    self.block(task * rows, rows)
            if rest:
                self.block(blocks * rows, rest)
            return
        # A few rows are not worth waking other threads for; the rest of a batch goes row by row.
        with T.If(batch < rows):
            with T.Then(), T.serial(batch) as row:
                self.block(row, 1)
            with T.Else(), T.parallel(batch // rows + batch % rows) as task, T.If(task < batch // rows):
                with T.Then():
                    self.block(task * rows, rows)
                with T.Else():
                    self.block(batch // rows * rows + (task - batch // rows), 1)

    def block(self, first: Any, rows: int) -> None:
        """All of the step for `rows` rows from `first` on."""
        spec, arg, d = self.spec, self.arg, self.spec.n_components
        inputs, points = self.buffer(rows, spec.width), None
        for r in range(rows):
            self.load(inputs, first + r, r, centred=d > 0)
        if d:
            points = self.buffer(rows, d)
            self.vectors.sums(
                rows,
                d,
                spec.width,
                lambda r, j, c, total: total + inputs[r, c] * arg["components"][j, c],
                lambda r, j, value: T.buffer_store(points, value, [r, j]),
            )
        points = inputs if points is None else points
        cluster = self.nearest(points, rows)
        with T.serial(rows) as r:
            self.correct(first + r, r, cluster[r], points)

    def buffer(self, rows: int, width: int) -> Any:
        """Rows in memory, each padded to whole vectors."""
        return T.alloc_buffer((rows, ceil_to(width, self.vectors.lanes)), "float32")

    def pad(self, buffer: Any, rows: int, extent: int, constant: float) -> None:
        """Fill the part of each row behind `extent`."""
        for r in range(rows):
            for column in range(extent, ceil_to(extent, self.vectors.lanes)):
                T.buffer_store(buffer, T.float32(constant), [r, column])

    def load(self, inputs: Any, row: Any, r: int, centred: bool) -> None:
        """Copy a row to float32, features behind logits."""
        spec = self.spec
        self._load_part(inputs, row, r, "logits", 0, spec.n_classes, centred)
        if spec.n_features:
            self._load_part(inputs, row, r, "features", spec.n_classes, spec.n_features, centred)
        # Without this TVM drops the padding and the next row is no longer aligned.
        for column in range(spec.width, ceil_to(spec.width, self.vectors.lanes)):
            T.buffer_store(inputs, T.float32(0), [r, column])

    def _load_part(
        self, inputs: Any, row: Any, r: int, name: str, start: int, extent: int, centred: bool
    ) -> None:
        source, mean = self.arg[name], self.arg["mean"]

        def body(offset: Any, width: int) -> None:
            def value(v: Any) -> Any:
                x = source[row, offset + v].astype("float32")
                return x - mean[start + offset + v] if centred else x

            self.vectors.put(inputs, width, value, lambda v: [r, start + offset + v])

        self.vectors.chunks(extent, body)

    def nearest(self, points: Any, rows: int) -> Any:
        """Cluster of each row of the block: squared differences, then the first minimum."""
        spec, centroids = self.spec, self.arg["centroids"]
        distance = self.buffer(rows, spec.n_clusters)
        self.pad(distance, rows, spec.n_clusters, float("inf"))

        def squared(r: int, j: Any, c: Any, total: Any) -> Any:
            difference = points[r, c] - centroids[j, c]
            return total + difference * difference

        self.vectors.sums(
            rows,
            spec.n_clusters,
            spec.distance_width,
            squared,
            lambda r, j, value: T.buffer_store(distance, value, [r, j]),
        )
        cluster = self.vectors.local(rows, "int32")

        def row_minimum(r: int) -> None:
            self.vectors.smallest(
                lambda v: distance[r, v],
                spec.n_clusters,
                lambda index, _: T.buffer_store(cluster, index, [r]),
            )

        for r in range(rows):
            row_minimum(r)
        return cluster

    def correct(self, row: Any, r: Any, cluster: Any, points: Any) -> None:
        """Map one row with its cluster's parameters, blend, finish and store."""
        spec, arg, alpha = self.spec, self.arg, T.float32(self.spec.alpha)
        final = spec.finish == "logits"
        target, place = (arg["output"], row) if final else (self.buffer(1, spec.n_classes), 0)

        def blend(c: Any, mapped: Any) -> Any:
            z = arg["logits"][row, c].astype("float32")
            y = z + alpha * (mapped - z)
            return y.astype(spec.dtype) if final else y

        if spec.op == OPS[2]:
            raw = self.buffer(1, spec.width)
            self.load(raw, row, 0, centred=False)
            self.vectors.sums(
                1,
                spec.n_classes,
                spec.width,
                lambda _, j, c, total: total + raw[0, c] * arg["weight"][cluster, j, c],
                lambda _, j, value: T.buffer_store(
                    target, blend(j, value + arg["beta"][cluster, j]), [place, j]
                ),
            )
        else:
            self._diagonal(row, r, cluster, points, lambda: (target, place), blend)
        if spec.finish == "softmax":
            self._softmax(row, target)
        elif spec.finish == "topk":
            self._largest(row, target)

    def _diagonal(
        self,
        row: Any,
        r: Any,
        cluster: Any,
        points: Any,
        where: Callable[[], tuple[Any, Any]],
        blend: Callable[[Any, Any], Any],
    ) -> None:
        """``gamma * z + beta``, plus the low-rank term if there is one."""
        spec, arg, (target, place) = self.spec, self.arg, where()
        reduced = self._reduced(r, cluster, points) if spec.rank else None

        def body(offset: Any, width: int) -> None:
            def diagonal(v: Any) -> Any:
                z = arg["logits"][row, offset + v].astype("float32")
                return arg["gamma"][cluster, offset + v] * z + arg["beta"][cluster, offset + v]

            mapped = diagonal
            if reduced is not None:
                total = self.vectors.local(width)
                self.vectors.put(total, width, diagonal)
                with T.serial(spec.rank) as i:
                    self.vectors.put(
                        total, width, lambda v: total[v] + reduced[i] * arg["right"][i, offset + v]
                    )
                mapped = total.__getitem__
            self.vectors.put(
                target, width, lambda v: blend(offset + v, mapped(v)), lambda v: [place, offset + v]
            )

        # Several vectors at once hide the latency of the low-rank sum.
        self.vectors.chunks(spec.n_classes, body, vectors=4 if spec.rank else 1)

    def _reduced(self, r: Any, cluster: Any, points: Any) -> Any:
        """``points[r] @ core[cluster]``, one value for each rank."""
        spec, core = self.spec, self.arg["core"]
        result = T.alloc_buffer((spec.rank,), "float32")

        def body(offset: Any, width: int) -> None:
            total = self.vectors.local(width)
            self.vectors.fill(total, width)
            with T.serial(spec.core_height) as i:
                self.vectors.put(
                    total, width, lambda v: total[v] + points[r, i] * core[cluster, i, offset + v]
                )
            self.vectors.put(result, width, total.__getitem__, lambda v: [offset + v])

        self.vectors.chunks(spec.rank, body)
        return result

    def _softmax(self, row: Any, values: Any) -> None:
        """Store ``exp(v - max) / sum`` of a row."""
        spec, vectors, lanes = self.spec, self.vectors, self.vectors.lanes
        self.pad(values, 1, spec.n_classes, float("-inf"))
        largest, partial, scale = vectors.local(1), vectors.local(lanes), vectors.local(1)
        vectors.smallest(
            lambda v: T.float32(0) - values[0, v],
            spec.n_classes,
            lambda _, best: T.buffer_store(largest, T.float32(0) - best, [0]),
        )
        vectors.fill(partial, lanes)
        with T.serial(ceil_to(spec.n_classes, lanes) // lanes) as chunk:
            start = chunk * lanes
            vectors.put(
                values, lanes, lambda v: T.exp(values[0, start + v] - largest[0]), lambda v: [0, start + v]
            )
            vectors.put(partial, lanes, lambda v: partial[v] + values[0, start + v])
        T.buffer_store(scale, T.float32(1) / vectors.total(partial), [0])
        vectors.chunks(
            spec.n_classes,
            lambda offset, width: vectors.put(
                self.arg["output"],
                width,
                lambda v: (values[0, offset + v] * scale[0]).astype(spec.dtype),
                lambda v: [row, offset + v],
            ),
        )

    def _largest(self, row: Any, values: Any) -> None:
        """Store the `top_k` largest values of a row and their places, by repeated search."""
        spec, arg = self.spec, self.arg
        self.pad(values, 1, spec.n_classes, float("-inf"))
        found = self.vectors.local(1, "int32")
        with T.serial(spec.top_k) as i:
            self.vectors.smallest(
                lambda v: T.float32(0) - values[0, v],
                spec.n_classes,
                lambda index, _: T.buffer_store(found, index, [0]),
            )
            T.buffer_store(arg["values"], values[0, found[0]].astype(spec.dtype), [row, i])
            T.buffer_store(arg["classes"], found[0].astype("int64"), [row, i])
            T.buffer_store(values, T.float32(float("-inf")), [0, found[0]])


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
