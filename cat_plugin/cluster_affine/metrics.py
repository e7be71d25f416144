"""How close corrected logits come to the full-precision ones, judged without labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine._typing import FloatArray

__all__ = ["agreement", "divergence", "natural_temperature", "softmax"]


def softmax(logits: FloatArray) -> FloatArray:
    """Return the distribution of each row."""
    power: FloatArray = np.exp(logits - logits.max(axis=1, keepdims=True))
    power /= power.sum(axis=1, keepdims=True)
    return power


def natural_temperature(z_fp: FloatArray) -> float:
    """Return the root mean square of the logits about each row's mean.

    In this unit divergences do not change when both sets of logits are scaled.
    """
    spread = float(np.sqrt(np.mean((z_fp - z_fp.mean(axis=1, keepdims=True)) ** 2)))
    return spread if spread > 0 else 1.0


def divergence(z_fp: FloatArray, z: FloatArray, temperature: float) -> FloatArray:
    """Kullback-Leibler divergence ``KL(softmax(z_fp / T) || softmax(z / T))`` of each row, in nats.

    Parameters
    ----------
    z_fp, z : ndarray of shape (N, C)
        Logits of the full-precision model, and those to compare with them.
    temperature : float
        T; both are divided by it before the softmax.

    Returns
    -------
    ndarray of shape (N,)
    """
    a = z_fp / temperature
    b = z / temperature
    a = a - a.max(axis=1, keepdims=True)
    b = b - b.max(axis=1, keepdims=True)
    log_a = a - np.log(np.exp(a).sum(axis=1, keepdims=True))
    log_b = b - np.log(np.exp(b).sum(axis=1, keepdims=True))
    result: FloatArray = (np.exp(log_a) * (log_a - log_b)).sum(axis=1)
    return result


def agreement(z_fp: FloatArray, z: FloatArray) -> NDArray[np.bool_]:
    """Whether both sets of logits name the same class, for each row."""
    same: NDArray[np.bool_] = z_fp.argmax(axis=1) == z.argmax(axis=1)
    return same
