"""Refine a full map so that it minimises the divergence from the full-precision distribution itself.

Least squares spends its effort on all logits alike; what decides the class is the distribution they give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.metrics import softmax

if TYPE_CHECKING:
    from cat_plugin.cluster_affine.parameters import AffineParameters

__all__ = ["refine_full"]

_ITERATIONS: Final = 120
#: Stops within some 1e-6 of the least divergence, whose error on rows held out is about 1e-2.
_TOLERANCE: Final = 3e-4
#: A cluster's own correction is held this much tighter than the one that all clusters share.
_CLUSTER_STRENGTH: Final = 4.0


def refine_full(
    parameters: AffineParameters,
    inputs: FloatArray,
    targets: FloatArray,
    scale: FloatArray,
    temperature: float,
    strength: float,
) -> AffineParameters:
    """Minimise the mean KL divergence from the full-precision distribution, staying near the starting maps.

    The objective is ``mean KL(softmax(z_fp / T) || softmax(z / T)) + strength / 2 * |change / T|^2`` with the
    change split into a part that all clusters share and one of each cluster.  Its Hessian is bounded by a constant
    matrix, so every step is one product with a factor that is computed once, and none needs a line search;
    steps are extrapolated, and the extrapolation restarts when the objective rises.

    Parameters
    ----------
    parameters : AffineParameters
        A fitted correction of mode ``full``.
    inputs : ndarray of shape (N, P)
        Logits of the quantized model, followed by the features where there are any.
    targets : ndarray of shape (N, C)
        Logits of the full-precision model.
    scale : ndarray of shape (P,)
        Typical size of a column relative to the logits, one for the logits.
    temperature : float
        Temperature T, in the units of the logits.
    strength : float
        Weight of the penalty, without a unit.

    Returns
    -------
    AffineParameters

    References
    ----------
    D. Böhning, "Multinomial logistic regression algorithm", Ann. Inst. Statist. Math. 44 (1992): the bound.
    B. O'Donoghue, E. Candès, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 15 (2015).
    """
    rows, classes = targets.shape
    clusters = parameters.n_clusters
    label = parameters.assign(inputs)
    start = parameters.replace(alpha=1.0).apply(inputs) / temperature
    goal = softmax(targets / temperature)

    mean = inputs.mean(axis=0)
    spread = np.sqrt(np.mean((inputs[:, :classes] - mean[:classes]) ** 2))
    if not spread > 0:
        return parameters
    unit = spread * scale
    white = np.concatenate([(inputs - mean) / unit, np.ones((rows, 1))], axis=1)
    width = white.shape[1]
    design = white
    penalty = np.full(width, strength)
    if clusters > 1:
        own = np.zeros((rows, clusters, width))
        own[np.arange(rows), label] = white
        design = np.concatenate([white, own.reshape(rows, -1)], axis=1)
        penalty = np.concatenate([penalty, np.full(clusters * width, _CLUSTER_STRENGTH * strength)])
    bound = design.T @ design / (2.0 * rows) + np.diag(penalty)
    # Inverted once: it is small and, thanks to the penalty, well conditioned.
    inverse = np.linalg.inv(bound)

    change = np.zeros((design.shape[1], classes))
    ahead, momentum, before = change, 1.0, np.inf
    for _ in range(_ITERATIONS):
        logits = start + design @ ahead
        logits -= logits.max(axis=1, keepdims=True)
        power = np.exp(logits)
        mass = power.sum(axis=1, keepdims=True)
        value = float(
            np.sum(goal * (np.log(mass) - logits)) / rows + 0.5 * np.sum(penalty[:, None] * ahead**2)
        )
        if value > before and momentum > 1.0:
            ahead, momentum, before = change, 1.0, np.inf
            continue
        gradient = design.T @ (power / mass - goal) / rows + penalty[:, None] * ahead
        step = inverse @ gradient
        new = ahead - step
        following = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * momentum**2))
        ahead = new + (momentum - 1.0) / following * (new - change)
        change, momentum = new, following
        if float(np.sum(step * gradient)) < _TOLERANCE**2 * max(1.0, value):
            break
        before = value

    shared, own_part = change[:width], change[width:].reshape(-1, width, classes)
    total = np.broadcast_to(shared, (clusters, width, classes)) + (own_part if clusters > 1 else 0.0)
    total = total * temperature
    moved = np.swapaxes(total[:, :-1], 1, 2) / unit
    weight = parameters.weight + moved
    beta = parameters.beta + total[:, -1] - moved @ mean
    return parameters.replace(weight=weight, beta=beta)
