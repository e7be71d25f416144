"""The fused cluster-affine step: projection, distances, argmin, gather, affine map and blend in one function.

``p = (x - mean) @ components.T``, ``k = argmin_j |p - centroids_j|^2`` (the lowest j among equals) and
``y = z + alpha * (map_k(x) - z)``, where ``map_k`` is ``gamma_k * z + beta_k``, the same plus a low-rank term, or a
full affine map.  Everything is computed in float32 and in one pass over each row; distances are sums of squared
differences, never the expanded form, so that equal centroids stay equal and near ties are decided as in float64.

References
----------
CAT, "Post-Training Quantization Error Reduction via Cluster-based Affine Transformation", arXiv 2509.26277.
"""

from __future__ import annotations

from typing import Any

from tvm.ir import IRModule
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine import cpu as cluster_affine_cpu
from tvm_backend.kernels.cluster_affine.cuda import kernel as cluster_affine_cuda
from tvm_backend.kernels.cluster_affine.reference import reference
from tvm_backend.kernels.cluster_affine.spec import OPS, ClusterAffineSpec, Finish

__all__ = ["OPS", "ClusterAffineSpec", "declaration", "lower", "prim_func", "reference", "schedule"]


def lower(spec: ClusterAffineSpec, target: Any = None) -> PrimFunc:
    """Write the function that `spec` describes, scheduled for a target.

    Parameters
    ----------
    spec : ClusterAffineSpec
        What to compute.
    target : tvm.target.Target, optional
        By default the current target, and without one a schedule that suits any CPU.

    Returns
    -------
    tvm.tirx.PrimFunc
        Arguments as in :meth:`ClusterAffineSpec.arguments`; private and marked as scheduled.
    """
    from tvm.target import Target

    if target is None:
        target = Target.current(allow_none=True)
    if target is not None and target.kind.name == "cuda":
        return cluster_affine_cuda.build(spec)
    return cluster_affine_cpu.build(spec, cluster_affine_cpu.CpuShape.for_target(target))


def declaration(spec: ClusterAffineSpec) -> PrimFunc:
    """A function with the arguments of the kernel of a specification and nothing in it."""
    with tir.Function("cluster_affine") as function:
        function.buffers(spec.sized(tir.batch_extent(spec.batch)))
        tir.nothing()
    return function.result


def prim_func(
    op: str,
    *,
    n_classes: int,
    n_clusters: int,
    n_components: int,
    n_features: int = 0,
    rank: int = 0,
    alpha: float = 0.4,
    batch: int | None = None,
    dtype: str = "float32",
    n_distance_components: int | None = None,
    finish: Finish = "logits",
    top_k: int = 5,
    target: Any = None,
) -> PrimFunc:
    """The fused step of one operator, ready for ``call_tir``.

    Parameters
    ----------
    op : str
        ``cat::cluster_affine``, ``cat::cluster_affine_lowrank`` or ``cat::cluster_affine_full``.
    n_classes, n_clusters, n_components, n_features, rank, alpha, batch, dtype, n_distance_components, finish, top_k
        As for :class:`ClusterAffineSpec`.
    target : tvm.target.Target, optional
        As for :func:`lower`.

    Returns
    -------
    tvm.tirx.PrimFunc
        Its arguments are the operator's tensor arguments in order, then the result.

    Raises
    ------
    cat_plugin.errors.CompileError
        The sizes do not go together, or there is no kernel for the operator.
    """
    spec = ClusterAffineSpec(
        op=op,
        n_classes=n_classes,
        n_clusters=n_clusters,
        n_components=n_components,
        n_features=n_features,
        rank=rank,
        alpha=float(alpha),
        batch=batch,
        dtype=dtype,
        n_distance_components=n_distance_components,
        finish=finish,
        top_k=top_k,
    )
    return lower(spec, target)


def schedule(target: Any, op: str = OPS[0], **sizes: Any) -> IRModule:
    """A module with the one function ``cluster_affine``, to be compiled and used alone.

    Parameters
    ----------
    target : tvm.target.Target
        What to schedule for.
    op : str
        The operator.
    **sizes
        As for :func:`prim_func`.

    Returns
    -------
    tvm.ir.IRModule

    Examples
    --------
    >>> module = schedule(target, n_classes=1000, n_clusters=64, n_components=50)  # doctest: +SKIP
    >>> tvm.compile(module, target=target)["cluster_affine"](*arrays)  # doctest: +SKIP
    """
    function = prim_func(op, target=target, **sizes).with_attr("global_symbol", "cluster_affine")
    return IRModule({"cluster_affine": function})
