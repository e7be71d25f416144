"""What a cluster-affine kernel computes: operator, sizes and types, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cat_plugin.errors import CompileError
from cat_plugin.graph.manifest import corrections

if TYPE_CHECKING:
    from cat_plugin.cluster_affine.families import AffineMap

__all__ = ["DTYPES", "OPAQUE", "OPS", "RESULTS", "ClusterAffineSpec", "Finish"]

_ARRAYS = {"mean", "components", "centroids", "gamma", "beta", "core", "right", "weight"}
"""The arrays that the kernels know what to do with."""

OPS = tuple(f"cat::{name}" for name, applied in corrections().items() if set(applied.arrays) <= _ARRAYS)
"""The operators with a fused kernel."""

DTYPES = ("float32", "float16", "bfloat16")
"""Types of the logits; parameters and sums are float32 throughout."""

RESULTS = ("output", "values", "classes")
"""Names of the arguments that a kernel writes."""

OPAQUE = 8
"""TVM's ``kOpaque``: the attribute ``op_pattern`` of a function that is not to be fused with others."""

Finish = Literal["logits", "softmax", "topk"]
"""What is made of the corrected logits."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CompileError(message)


@dataclass(frozen=True)
class ClusterAffineSpec:
    """Sizes and constants of one fused cluster-affine step.

    Parameters
    ----------
    op : str
        One of :data:`OPS`.
    n_classes : int
        C, columns of the logits.
    n_clusters : int
        K, rows of the centroids.
    n_components : int
        d, rows of the projection; 0 compares the logits themselves with the centroids.
    n_features : int
        F, columns of the further input of ``cat::cluster_affine_full``; 0 when it is absent.
    rank : int
        r, of ``cat::cluster_affine_lowrank``.
    alpha : float
        Blending factor, a constant of the kernel.
    batch : int or None
        Rows; None makes it a run-time value.
    dtype : str
        One of :data:`DTYPES`, of logits, features and result.
    n_distance_components : int or None
        d', columns of the centroids; by default all d.
    finish : {"logits", "softmax", "topk"}
        Store the corrected logits, their softmax, or the `top_k` largest with their classes.
    top_k : int
        For ``finish="topk"``.
    """

    op: str
    n_classes: int
    n_clusters: int
    n_components: int
    n_features: int = 0
    rank: int = 0
    alpha: float = 0.4
    batch: int | None = None
    dtype: str = "float32"
    n_distance_components: int | None = None
    finish: Finish = "logits"
    top_k: int = 5

    def __post_init__(self) -> None:
        _require(self.op in OPS, f"no fused kernel for {self.op!r}; there is one for {', '.join(OPS)}")
        _require(self.dtype in DTYPES, f"logits of type {self.dtype!r}; use one of {', '.join(DTYPES)}")
        _require(
            self.n_classes >= 1 and self.n_clusters >= 1 and self.n_components >= 0,
            f"{self.n_classes} classes, {self.n_clusters} clusters, {self.n_components} components: "
            "classes and clusters must be positive, components must not be negative",
        )
        _require(
            self.batch is None or self.batch >= 1, f"the batch size must be positive, not {self.batch!r}"
        )
        _require(math.isfinite(self.alpha), f"alpha is {self.alpha}; it must be finite")
        _require(
            self.has("core") == (self.rank > 0),
            f"rank {self.rank} does not go with {self.op}: only lowrank has a rank",
        )
        _require(
            self.n_features >= 0 and (self.map.takes_features or self.n_features == 0),
            f"n_features {self.n_features} does not go with {self.op}: only full takes features",
        )
        distance = self.n_distance_components
        _require(
            distance is None or (self.n_components > 0 and 1 <= distance <= self.n_components),
            f"{distance} columns of the centroids cannot be compared with {self.n_components} components",
        )
        _require(self.finish in ("logits", "softmax", "topk"), f"finish {self.finish!r} is not known")
        _require(
            self.finish != "topk" or 1 <= self.top_k <= self.n_classes,
            f"the {self.top_k} largest of {self.n_classes} logits cannot be taken",
        )

    @property
    def map(self) -> AffineMap:
        """The operator's map: its arrays and their shapes."""
        return corrections()[self.op.removeprefix("cat::")]

    def has(self, array: str) -> bool:
        """Whether the operator has an array of that name."""
        return array in self.map.arrays

    @property
    def width(self) -> int:
        """P = C + F, columns of what is projected and mapped."""
        return self.n_classes + self.n_features

    @property
    def distance_width(self) -> int:
        """Columns of the centroids."""
        if self.n_components == 0:
            return self.width
        return self.n_distance_components or self.n_components

    @property
    def core_height(self) -> int:
        """Rows of a low-rank core: what is projected onto, or the row itself."""
        return self.n_components or self.n_classes

    def arguments(self) -> list[tuple[str, tuple[int | None, ...], str]]:
        """Name, shape and dtype of each kernel argument, results last; None stands for the batch.

        Returns
        -------
        list of (str, tuple, str)
            In the order of the operator's tensor arguments.
        """
        classes, width = self.n_classes, self.width
        result: list[tuple[str, tuple[int | None, ...], str]] = [("logits", (None, classes), self.dtype)]
        if self.n_features:
            result.append(("features", (None, self.n_features), self.dtype))
        extents = {"K": self.n_clusters, "C": classes, "P": width, "D": self.core_height, "R": self.rank}
        result += [
            ("mean", (width,), "float32"),
            ("components", (self.n_components, width), "float32"),
            ("centroids", (self.n_clusters, self.distance_width), "float32"),
            *(
                (name, tuple(extents[letter] for letter in letters), "float32")
                for name, letters in self.map.shapes.items()
            ),
        ]
        if self.finish == "topk":
            return [
                *result,
                ("values", (None, self.top_k), self.dtype),
                ("classes", (None, self.top_k), "int64"),
            ]
        return [*result, ("output", (None, classes), self.dtype)]

    def sized(self, batch: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """The same with `batch`, a number or a TIR expression, in its place."""
        return [
            (name, tuple(batch if extent is None else extent for extent in shape), dtype)
            for name, shape, dtype in self.arguments()
        ]

    def floor_bytes(self, batch: int) -> int:
        """Fewest bytes that `batch` rows move through memory: each argument read or written once."""
        size = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
        return sum(math.prod(shape) * size[dtype] for _, shape, dtype in self.sized(batch))
