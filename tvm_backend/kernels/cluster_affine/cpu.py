"""The cluster-affine step on a CPU: one PrimFunc, scheduled as it is written.

Rows go in blocks, so that a vector of the components that comes from the second-level cache is used for several
rows; sums run in vectors along the contiguous axis of every operand, so that no operand is transposed or copied.
A block's rows lie in the first-level cache until the last step.  Threads share the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine.spec import OPAQUE, ClusterAffineSpec
from tvm_backend.kernels.cluster_affine.vectors import Vectors, ceil_to

__all__ = ["CpuShape", "build"]

_BLOCKS = 2
"""Blocks of rows that are worth handing to a thread."""

_FEW = 3
"""Fewer rows than this are computed one by one: a block takes as long as three of them."""


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
                    return cls(16, 8, 2)
                if codegen.llvm_cpu_has_features("avx2"):
                    return cls(8, 4, 2)
        return cls(4, 4, 4)


class _Emitter:
    """Writes the body of the function for one specification, statement by statement, into the current builder."""

    def __init__(self, spec: ClusterAffineSpec, shape: CpuShape, arg: dict[str, Any]) -> None:
        self.spec, self.rows, self.arg = spec, shape.rows, arg
        self.vectors = Vectors(shape.lanes, shape.rows * shape.columns)

    def emit(self, batch: Any) -> None:
        """The whole body: the blocks in parallel."""
        rows = self.rows
        unit = _BLOCKS * rows

        def few() -> None:
            with tir.loop(batch) as row:
                self.task(row, 1, 1)

        def alone() -> None:
            self.task(0, batch, rows)

        def shared() -> None:
            with tir.parallel((batch + (unit - 1)) // unit) as task:
                self.task(task * unit, tir.smaller(batch - task * unit, unit), rows)

        # A block's work is done whole; for one or two rows that is too much, and a few are not worth waking threads.
        tir.branch(batch < _FEW, few, lambda: tir.branch(batch <= unit, alone, shared))

    def task(self, first: Any, count: Any, rows: int) -> None:
        """`count` rows from `first` on, in blocks that share the memory they work in.

        Where the last block is not full, its last row is computed several times, always with the same result.
        """
        spec = self.spec
        inputs = self.buffer(rows, spec.width)
        points = self.buffer(rows, spec.n_components) if spec.n_components else inputs
        with tir.loop(rows) as r:
            # Without this TVM drops the padding and the next row is no longer aligned.
            self.pad(inputs, r, spec.width, 0.0)
        with tir.loop((count + (rows - 1)) // rows) as block:
            start = first + block * rows
            self.block(
                inputs,
                points,
                rows,
                lambda r: tir.smaller(start + r, first + count - 1) if rows > 1 else start,
            )

    def block(self, inputs: Any, points: Any, rows: int, place: Callable[[Any], Any]) -> None:
        """All of the step for `rows` rows, the r-th of which is row ``place(r)`` of the batch."""
        spec, components = self.spec, self.arg["components"]
        with tir.loop(rows) as r:
            self.load(inputs, place(r), r, centred=spec.n_components > 0)
        if spec.n_components:
            self.vectors.sums(
                rows,
                spec.n_components,
                spec.width,
                lambda r, j, c, total: total + inputs[r, c] * components[j, c],
                lambda r, j, value: tir.store(points, value, [r, j]),
            )
        cluster = self.nearest(points, rows)
        with tir.loop(rows) as r:
            self.correct(place(r), r, cluster[r], points)

    def buffer(self, rows: int, width: int) -> Any:
        """Rows in memory, each padded to whole vectors."""
        return tir.allocate((rows, ceil_to(width, self.vectors.lanes)), "float32")

    def pad(self, buffer: Any, row: Any, extent: int, constant: float) -> None:
        """Fill the part of a row behind `extent`."""
        for column in range(extent, ceil_to(extent, self.vectors.lanes)):
            tir.store(buffer, tir.float32(constant), [row, column])

    def load(self, inputs: Any, row: Any, r: Any, centred: bool) -> None:
        """Copy a row to float32, features behind logits."""
        spec = self.spec
        self._load_part(inputs, row, r, "logits", 0, spec.n_classes, centred)
        if spec.n_features:
            self._load_part(inputs, row, r, "features", spec.n_classes, spec.n_features, centred)

    def _load_part(
        self, inputs: Any, row: Any, r: Any, name: str, start: int, extent: int, centred: bool
    ) -> None:
        source, mean = self.arg[name], self.arg["mean"]

        def body(offset: Any, width: int) -> None:
            def value(v: Any) -> Any:
                x = source[row, offset + v].astype("float32")
                return x - mean[start + offset + v] if centred else x

            self.vectors.put(inputs, width, value, lambda v: [r, start + offset + v])

        self.vectors.chunks(extent, body, vectors=2)

    def nearest(self, points: Any, rows: int) -> Any:
        """Cluster of each row of the block: squared differences, then the first minimum."""
        spec, centroids = self.spec, self.arg["centroids"]
        distance = self.buffer(rows, spec.n_clusters)
        with tir.loop(rows) as r:
            self.pad(distance, r, spec.n_clusters, float("inf"))

        def squared(r: int, j: Any, c: Any, total: Any) -> Any:
            difference = points[r, c] - centroids[j, c]
            return total + difference * difference

        self.vectors.sums(
            rows,
            spec.n_clusters,
            spec.distance_width,
            squared,
            lambda r, j, value: tir.store(distance, value, [r, j]),
        )
        cluster = self.vectors.local(rows, "int32")
        with tir.loop(rows) as r:
            self.vectors.smallest(
                lambda v: distance[r, v],
                spec.n_clusters,
                lambda index, _: tir.store(cluster, index, [r]),
            )
        return cluster

    def correct(self, row: Any, r: Any, cluster: Any, points: Any) -> None:
        """Map one row with its cluster's parameters, blend, finish and store."""
        spec, arg, alpha = self.spec, self.arg, tir.float32(self.spec.alpha)
        final = spec.finish == "logits"
        target, place = (arg["output"], row) if final else (self.buffer(1, spec.n_classes), 0)

        def blend(c: Any, mapped: Any) -> Any:
            z = arg["logits"][row, c].astype("float32")
            y = z + alpha * (mapped - z)
            return y.astype(spec.dtype) if final else y

        if spec.has("weight"):
            raw = self.buffer(1, spec.width)
            self.pad(raw, 0, spec.width, 0.0)
            self.load(raw, row, 0, centred=False)
            self.vectors.sums(
                1,
                spec.n_classes,
                spec.width,
                lambda _, j, c, total: total + raw[0, c] * arg["weight"][cluster, j, c],
                lambda _, j, value: tir.store(target, blend(j, value + arg["beta"][cluster, j]), [place, j]),
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
                with tir.loop(spec.rank) as i:
                    self.vectors.put(
                        total, width, lambda v: total[v] + reduced[i] * arg["right"][i, offset + v]
                    )
                mapped = total.__getitem__
            self.vectors.put(
                target, width, lambda v: blend(offset + v, mapped(v)), lambda v: [place, offset + v]
            )

        # Several vectors at once hide the latency of the low-rank sum.
        self.vectors.chunks(spec.n_classes, body, vectors=4 if spec.rank else 2)

    def _reduced(self, r: Any, cluster: Any, points: Any) -> Any:
        """``points[r] @ core[cluster]``, one value for each rank."""
        spec, core = self.spec, self.arg["core"]
        result = tir.allocate((spec.rank,), "float32")

        def body(offset: Any, width: int) -> None:
            total = self.vectors.local(width)
            self.vectors.fill(total, width)
            with tir.loop(spec.core_height) as i:
                self.vectors.put(
                    total, width, lambda v: total[v] + points[r, i] * core[cluster, i, offset + v]
                )
            self.vectors.put(result, width, total.__getitem__, lambda v: [offset + v])

        self.vectors.chunks(spec.rank, body)
        return result

    def _softmax(self, row: Any, values: Any) -> None:
        """Store ``exp(v - max) / sum`` of a row."""
        spec, vectors, lanes = self.spec, self.vectors, self.vectors.lanes
        self.pad(values, 0, spec.n_classes, float("-inf"))
        largest, partial, scale = vectors.local(1), vectors.local(lanes), vectors.local(1)
        vectors.smallest(
            lambda v: tir.float32(0) - values[0, v],
            spec.n_classes,
            lambda _, best: tir.store(largest, tir.float32(0) - best, [0]),
        )
        vectors.fill(partial, lanes)
        with tir.loop(ceil_to(spec.n_classes, lanes) // lanes) as chunk:
            start = chunk * lanes
            vectors.put(
                values, lanes, lambda v: tir.exp(values[0, start + v] - largest[0]), lambda v: [0, start + v]
            )
            vectors.put(partial, lanes, lambda v: partial[v] + values[0, start + v])
        tir.store(scale, tir.float32(1) / vectors.total(partial), [0])
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
        self.pad(values, 0, spec.n_classes, float("-inf"))
        found = self.vectors.local(1, "int32")
        with tir.loop(spec.top_k) as i:
            self.vectors.smallest(
                lambda v: tir.float32(0) - values[0, v],
                spec.n_classes,
                lambda index, _: tir.store(found, index, [0]),
            )
            tir.store(arg["values"], values[0, found[0]].astype(spec.dtype), [row, i])
            tir.store(arg["classes"], found[0].astype("int64"), [row, i])
            tir.store(values, tir.float32(float("-inf")), [0, found[0]])


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
    with tir.Function(private=True, op_pattern=OPAQUE) as function:
        batch = tir.batch_extent(spec.batch)
        arguments = spec.sized(batch)
        buffers = function.buffers(arguments)
        named = {name: buffer for (name, _, _), buffer in zip(arguments, buffers, strict=True)}
        _Emitter(spec, shape, named).emit(batch)
    return function.result
