"""The cluster-affine step in ONNX's standard operators: MatMul, ArgMin, Gather, Mul, Add and what shapes need.

Blending is folded into the constants, so a logit differs from the torch op's by a rounding or two of float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cat_plugin.cluster_affine import AffineParameters
from cat_plugin.graph.onnx.files import need

__all__ = ["Fragment", "write_step"]


@dataclass
class Fragment:
    """Nodes and constants that are being written, under names that start with `prefix`.

    Attributes
    ----------
    prefix : str
        Start of every name.
    nodes : list of onnx.NodeProto
        Those written so far, in their order.
    initializers : list of onnx.TensorProto
        The constants that they use.
    """

    prefix: str
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)

    def constant(self, array: np.ndarray[Any, Any], name: str) -> str:
        """Store an array; returns its name."""
        full = f"{self.prefix}{name}"
        self.initializers.append(need("onnx").numpy_helper.from_array(np.ascontiguousarray(array), full))
        return full

    def emit(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node of one output; returns the output's name."""
        full = f"{self.prefix}{name}"
        self.nodes.append(need("onnx").helper.make_node(op, inputs, [full], name=full, **attributes))
        return full


def write_step(
    fragment: Fragment, parameters: AffineParameters, logits: str, features: str | None = None
) -> str:
    """Append the correction of one tensor of logits.

    Parameters
    ----------
    fragment : Fragment
        Where nodes and constants go; any opset from 7 on takes them.
    parameters : AffineParameters
        With C classes.
    logits : str
        Name of a float32 tensor (N, C).
    features : str, optional
        Name of a float32 tensor (N, F), for a correction with features.

    Returns
    -------
    str
        Name of the corrected logits, float32 (N, C).

    References
    ----------
    arXiv:2509.26277, inference with blending factor.
    """
    p, terms = parameters, parameters.terms()
    inputs = logits
    if features is not None:
        inputs = fragment.emit("Concat", [logits, features], "inputs", axis=1)
    position = inputs
    if p.components.shape[0]:
        mean = fragment.constant(_single(p.mean), "mean")
        components = fragment.constant(_single(p.components.T), "components")
        centred = fragment.emit("Sub", [inputs, mean], "centred")
        position = fragment.emit("MatMul", [centred, components], "position")
    label = None if p.n_clusters == 1 else _nearest(fragment, p, position)
    shift = _chosen(fragment, p.alpha * terms.offset, label, "shift")
    if terms.slope is not None:
        scale = _chosen(fragment, 1.0 + p.alpha * (terms.slope - 1.0), label, "scale")
    else:
        scale = fragment.constant(_single(1.0 - p.alpha), "kept")
    result = fragment.emit("Mul", [logits, scale], "scaled")
    if terms.matrix is not None:
        rows = position if terms.projected else inputs
        change = _product(fragment, rows, p.alpha * terms.matrix, label, "map")
        if terms.right is not None:
            right = fragment.constant(_single(terms.right), "right")
            change = fragment.emit("MatMul", [change, right], "change")
        result = fragment.emit("Add", [result, change], "mapped")
    return fragment.emit("Add", [result, shift], "corrected")


def _single(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array, dtype=np.float32)


def _nearest(fragment: Fragment, p: AffineParameters, position: str) -> str:
    """Index of the nearest centroid: distances relative to the first one, as the torch op computes them."""
    # Centroids may live in the first few coordinates only: zeros behind them compare the same coordinates.
    width = p.components.shape[0] or p.centroids.shape[1]
    centroids = np.pad(p.centroids, ((0, 0), (0, width - p.centroids.shape[1])))
    relative = centroids - centroids[0]
    origin = fragment.constant(_single(centroids[0]), "origin")
    directions = fragment.constant(_single(-2.0 * relative.T), "directions")
    norms = fragment.constant(_single((relative**2).sum(axis=1)), "norms")
    moved = fragment.emit("Sub", [position, origin], "moved")
    products = fragment.emit("MatMul", [moved, directions], "products")
    score = fragment.emit("Add", [products, norms], "score")
    return fragment.emit("ArgMin", [score], "label", axis=1, keepdims=0)


def _chosen(fragment: Fragment, table: np.ndarray[Any, Any], label: str | None, name: str) -> str:
    """The row of each sample's cluster, (N, C); the one row there is, (C,), without clusters."""
    if label is None:
        return fragment.constant(_single(table[0]), name)
    return fragment.emit("Gather", [fragment.constant(_single(table), f"{name}s"), label], name, axis=0)


def _product(
    fragment: Fragment, rows: str, matrices: np.ndarray[Any, Any], label: str | None, name: str
) -> str:
    """Multiply each row (N, P) by its cluster's matrix (K, P, R)."""
    if label is None:
        return fragment.emit("MatMul", [rows, fragment.constant(_single(matrices[0]), name)], f"{name}_rows")
    _, inner, outer = matrices.shape
    stored = fragment.constant(_single(matrices), f"{name}s")
    picked = fragment.emit("Gather", [stored, label], name, axis=0)
    as_matrix = fragment.constant(np.array([-1, 1, inner], dtype=np.int64), f"{name}_in")
    as_row = fragment.constant(np.array([-1, outer], dtype=np.int64), f"{name}_out")
    row = fragment.emit("Reshape", [rows, as_matrix], f"{name}_row")
    product = fragment.emit("MatMul", [row, picked], f"{name}_product")
    return fragment.emit("Reshape", [product, as_row], f"{name}_rows")
