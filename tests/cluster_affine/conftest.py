"""Logits with structure: a distortion that is non-linear, as clipping makes it."""

from __future__ import annotations

import numpy as np
import pytest


def distorted(rows, classes=6, seed=0, noise=0.3):
    """Full-precision logits and a mixed, squashed and noisy version of them."""
    rng = np.random.default_rng(seed)
    z_fp = rng.normal(size=(rows, classes)) * 4
    mixing = np.eye(classes) + 0.25 * rng.normal(size=(classes, classes))
    z_q = 3 * np.tanh(z_fp @ mixing / 4) + noise * rng.normal(size=(rows, classes)) + 0.5
    return z_q, z_fp


@pytest.fixture
def logits():
    """600 rows of 6 classes."""
    return distorted(600)
