"""What both CUDA kernels of the cluster-affine step share: warp-wide sums and minima, the affine map of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine.spec import ClusterAffineSpec
from tvm_backend.kernels.cuda import device

__all__ = ["SHARED", "THREADS", "WARPS", "Emitter"]

WARPS = 8
THREADS = 32 * WARPS
SHARED = 48 * 1024
"""Bytes of shared memory that every device has."""


class Emitter:
    """What both kernels share: arguments, warp-wide sums and minima, the affine map of a row."""

    def __init__(self, spec: ClusterAffineSpec, arg: dict[str, Any], batch: Any) -> None:
        self.spec, self.arg, self.batch = spec, arg, batch
        # 16-byte loads need rows that start at 16 bytes.
        self.vector = 4 if spec.dtype == "float32" and spec.n_classes % 4 == 0 and not spec.n_features else 1

    def put(self, buffer: Any, value: Any, *index: Any) -> None:
        """Assign."""
        tir.store(buffer, value, index)

    def warp_sum(self, held: Any, place: int = 0) -> None:
        """Replace a register by its sum over the warp, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            self.put(held, held[place] + device.exchanged(held[place], distance, "float32"), place)

    def warp_first_minimum(self, best: Any, index: Any, place: int = 0) -> None:
        """The smallest value of the warp and its index, the lowest among equals, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            value, other = device.local(1), device.local(1, "int32")
            self.put(value, device.exchanged(best[place], distance, "float32"), 0)
            self.put(other, device.exchanged(index[place], distance, "int32"), 0)
            equal = tir.all_of(value[0] == best[place], other[0] < index[place])
            closer = tir.either(value[0] < best[place], equal)
            self.put(index, tir.select(closer, other[0], index[place]), place)
            self.put(best, tir.smaller(value[0], best[place]), place)

    def scan(self, best: Any, index: Any, lane: Any, value: Callable[[Any], Any], place: int = 0) -> None:
        """The first minimum over all clusters of ``value(k)``."""
        clusters = self.spec.n_clusters
        self.put(best, tir.float32(float("inf")), place)
        # In range even if no comparison holds.
        self.put(index, tir.smaller(lane, tir.int32(clusters - 1)), place)
        with tir.loop(-(-clusters // 32)) as step, tir.when(step * 32 + lane < clusters):
            found = device.local(1)
            self.put(found, value(step * 32 + lane), 0)
            self.put(index, tir.select(found[0] < best[place], step * 32 + lane, index[place]), place)
            self.put(best, tir.smaller(best[place], found[0]), place)
        self.warp_first_minimum(best, index, place)

    def source(self, row: Any, column: Any) -> Any:
        """One value of the input in float32, features behind logits."""
        value = self.arg["logits"][row, column].astype("float32")
        if not self.spec.n_features:
            return value
        behind = tir.larger(column - self.spec.n_classes, 0)
        feature = self.arg["features"][row, behind].astype("float32")
        inside = self.arg["logits"][row, tir.smaller(column, self.spec.n_classes - 1)].astype("float32")
        return tir.if_else(column < self.spec.n_classes, inside, feature)

    def blend(self, z: Any, mapped: Any) -> Any:
        """The corrected logit, in float32."""
        return z + tir.float32(self.spec.alpha) * (mapped - z)

    def corrected(self, row: Any, cluster: Any, column: Any, reduced: Callable[[Any], Any] | None) -> Any:
        """One value of the diagonal map, plus the low-rank term."""
        spec, arg = self.spec, self.arg
        z, mapped = device.local(1), device.local(1)
        self.put(z, arg["logits"][row, column].astype("float32"), 0)
        self.put(mapped, arg["gamma"][cluster, column] * z[0] + arg["beta"][cluster, column], 0)
        if reduced is not None:
            with tir.loop(spec.rank) as i:
                self.put(mapped, mapped[0] + reduced(i) * arg["right"][i, column], 0)
        return self.blend(z[0], mapped[0])

    def map_row(
        self, row: Any, cluster: Any, thread: Any, threads: int, reduced: Callable[[Any], Any] | None
    ) -> None:
        """Store the diagonal map of a row, plus the low-rank term, by `threads` threads."""
        spec, arg, width = self.spec, self.arg, self.vector
        total, logits = device.local(width), device.local(width)
        with tir.loop(-(-spec.n_classes // (threads * width))) as step:
            start = (step * threads + thread) * width
            with tir.when(start < spec.n_classes):

                def each(buffer: Any, value: Callable[[Any], Any]) -> None:
                    with tir.vectorized(width) as v:
                        self.put(buffer, value(v), v)

                each(logits, lambda v: arg["logits"][row, start + v].astype("float32"))
                each(total, lambda v: arg["gamma"][cluster, start + v])
                each(total, lambda v: total[v] * logits[v] + arg["beta"][cluster, start + v])
                if reduced is not None:
                    with tir.loop(spec.rank) as i:
                        each(total, lambda v: total[v] + reduced(i) * arg["right"][i, start + v])
                with tir.vectorized(width) as v:
                    value = self.blend(logits[v], total[v]).astype(spec.dtype)
                    self.put(arg["output"], value, row, start + v)
