"""The ops that apply a correction: ``cat::cluster_affine`` and its low-rank and full relatives.

Importing this module registers them with ``torch.library``.  Each is one node of an exported graph, works on
CPU and CUDA with a dynamic batch, computes in float32 and returns the dtype of the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["cluster_affine", "cluster_affine_full", "cluster_affine_lowrank"]


def _working(logits: Tensor) -> Tensor:
    """Upcast half precision; float64 stays, so that a reference can be computed with the same op."""
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off: a correction computed in half precision would undo what it corrects."""
    return torch.autocast(tensor.device.type, enabled=False)


def _position(rows: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    if components.shape[0] == 0:
        return rows
    return (rows - mean.to(rows.dtype)) @ components.to(rows.dtype).t()


def _nearest(position: Tensor, centroids: Tensor) -> Tensor:
    # Distances relative to the first centroid: a common offset cancels before anything is squared, and
    # neither an (N, K, d) tensor nor a square root is needed.
    centroids = centroids.to(position.dtype)
    origin = centroids[0]
    relative = centroids - origin
    score = (relative * relative).sum(dim=1) - 2.0 * (
        (position[:, : centroids.shape[1]] - origin) @ relative.t()
    )
    return score.argmin(dim=1)


def _per_cluster(rows: Tensor, label: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each row (N, P) by its cluster's matrix (K, P, R) without gathering N matrices."""
    clusters, inner, outer = matrices.shape
    if clusters * inner * outer <= 1 << 16:
        # Small maps: multiply by all of them at once and pick; no data-dependent shapes, no loop.
        every = torch.einsum("np,kpr->nkr", rows, matrices)
        picked = label.view(-1, 1, 1).expand(-1, 1, outer)
        return every.gather(1, picked).squeeze(1)
    result = rows.new_zeros(rows.shape[0], outer)
    for cluster in range(clusters):
        member = (label == cluster).nonzero().squeeze(1)
        result.index_copy_(0, member, rows.index_select(0, member) @ matrices[cluster])
    return result


def _check(logits: Tensor, classes: int) -> None:
    if logits.dim() != 2:
        raise RuntimeError(f"logits must have shape (N, C); got {tuple(logits.shape)}")
    if logits.shape[1] != classes:
        raise RuntimeError(f"logits have {logits.shape[1]} classes, the correction was fitted on {classes}")
    if not logits.is_floating_point():
        raise RuntimeError(f"logits must be floating point; got {logits.dtype}")


def _operation(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as an op, and what it returns without computing it.

    That is a tensor like the logits, of as many classes as `beta` has.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        op: Callable[..., Tensor] = torch.library.custom_op(name, mutates_args=())(function)
        names = list(inspect.signature(function).parameters)

        def fake(*arguments: Any) -> Tensor:
            given = dict(zip(names, arguments, strict=True))
            _check(given["logits"], given["beta"].shape[1])
            return torch.empty_like(given["logits"], memory_format=torch.contiguous_format)

        torch.library.register_fake(name)(fake)
        return op

    return register


@_operation("cat::cluster_affine")
def cluster_affine(
    logits: Tensor,
    mean: Tensor,
    components: Tensor,
    centroids: Tensor,
    gamma: Tensor,
    beta: Tensor,
    alpha: float,
) -> Tensor:
    """Correct logits by the affine map of their cluster.

    Parameters
    ----------
    logits : Tensor of shape (N, C), floating point
        Of the quantized model.
    mean : Tensor of shape (C,)
        Subtracted before the projection.
    components : Tensor of shape (d, C)
        ``d = 0``: no projection.
    centroids : Tensor of shape (K, d), or (K, C) without projection
        Of the clusters.
    gamma, beta : Tensor of shape (K, C)
        Slope and offset of each class in each cluster.
    alpha : float
        Blending factor.

    Returns
    -------
    Tensor of shape (N, C), of the dtype of `logits`
        ``z + alpha * (gamma_k * z + beta_k - z)`` with ``k`` the nearest centroid, the lowest in a tie.

    References
    ----------
    arXiv:2509.26277, inference with blending factor.
    """
    _check(logits, gamma.shape[1])
    z = _working(logits)
    with _full_precision(z):
        label = _nearest(_position(z, mean, components), centroids)
        corrected = z + alpha * (gamma.to(z.dtype)[label] * z + beta.to(z.dtype)[label] - z)
    return corrected.to(logits.dtype)


@_operation("cat::cluster_affine_lowrank")
def cluster_affine_lowrank(
    logits: Tensor,
    mean: Tensor,
    components: Tensor,
    centroids: Tensor,
    gamma: Tensor,
    beta: Tensor,
    core: Tensor,
    right: Tensor,
    alpha: float,
) -> Tensor:
    """Correct logits by a diagonal map plus a low-rank one in principal components.

    Parameters
    ----------
    logits : Tensor of shape (N, C), floating point
        Of the quantized model.
    mean : Tensor of shape (C,)
        Subtracted before the projection.
    components : Tensor of shape (d, C)
        ``d = 0``: no projection, ``p`` is the row of logits.
    centroids : Tensor of shape (K, d') with d' <= d
        Compared with the first ``d'`` coordinates of the projection.
    gamma, beta : Tensor of shape (K, C)
        Slope and offset of each class in each cluster.
    core : Tensor of shape (K, d, r)
        First factor of the low-rank matrix, one for each cluster.
    right : Tensor of shape (r, C)
        Second factor, common to all clusters.
    alpha : float
        Blending factor.

    Returns
    -------
    Tensor of shape (N, C), of the dtype of `logits`
        ``z + alpha * (gamma_k * z + beta_k - z + (p @ core_k) @ right)``.
    """
    _check(logits, gamma.shape[1])
    z = _working(logits)
    with _full_precision(z):
        position = _position(z, mean, components)
        label = _nearest(position, centroids)
        change = gamma.to(z.dtype)[label] * z + beta.to(z.dtype)[label] - z
        change = change + _per_cluster(position, label, core.to(z.dtype)) @ right.to(z.dtype)
    return (z + alpha * change).to(logits.dtype)


@_operation("cat::cluster_affine_full")
def cluster_affine_full(
    logits: Tensor,
    features: Tensor | None,
    mean: Tensor,
    components: Tensor,
    centroids: Tensor,
    weight: Tensor,
    beta: Tensor,
    alpha: float,
) -> Tensor:
    """Correct logits by the full affine map of their cluster, from logits and, if given, features.

    Parameters
    ----------
    logits : Tensor of shape (N, C), floating point
        Of the quantized model.
    features : Tensor of shape (N, F) or None
        Further regressors; ``x`` is the logits followed by them, ``P = C + F``.
    mean : Tensor of shape (P,)
        Subtracted before the projection.
    components : Tensor of shape (d, P)
        ``d = 0``: no projection.
    centroids : Tensor of shape (K, d), or (K, P) without projection
        Of the clusters.
    weight : Tensor of shape (K, C, P)
        Matrix of each cluster.
    beta : Tensor of shape (K, C)
        Offset of each cluster.
    alpha : float
        Blending factor.

    Returns
    -------
    Tensor of shape (N, C), of the dtype of `logits`
        ``z + alpha * (weight_k @ x + beta_k - z)``.
    """
    _check(logits, beta.shape[1])
    z = _working(logits)
    x = z if features is None else torch.cat([z, features.to(z.dtype)], dim=1)
    if x.shape[1] != weight.shape[2]:
        raise RuntimeError(
            f"logits and features have {x.shape[1]} columns, the correction was fitted on {weight.shape[2]}"
        )
    with _full_precision(z):
        label = _nearest(_position(x, mean, components), centroids)
        mapped = _per_cluster(x, label, weight.to(z.dtype).transpose(1, 2)) + beta.to(z.dtype)[label]
    return (z + alpha * (mapped - z)).to(logits.dtype)
