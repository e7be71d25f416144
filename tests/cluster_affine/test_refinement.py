"""The refined map is the minimum of the objective that it is said to minimise, found another way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from cat_plugin.cluster_affine import AffineParameters, metrics
from cat_plugin.cluster_affine.refinement import refine_full


def start_of(clusters, classes, features, rng):
    width = classes + features
    weight = np.zeros((clusters, classes, width))
    weight[:, :, :classes] = np.eye(classes)
    return AffineParameters(
        "full",
        1.0,
        mean=np.zeros(width),
        components=np.zeros((0, width)),
        centroids=rng.normal(size=(clusters, width)),
        weight=weight,
        beta=0.1 * rng.normal(size=(clusters, classes)),
    )


@pytest.mark.parametrize(("clusters", "features"), [(1, 0), (1, 2), (3, 0), (2, 1)])
@pytest.mark.parametrize(("temperature", "strength"), [(1.5, 0.05), (0.5, 0.3)])
def test_minimum_of_the_divergence_and_the_penalty(clusters, features, temperature, strength):
    rng = np.random.default_rng(clusters + features)
    rows, classes = 150, 3
    z_q = rng.normal(size=(rows, classes)) * 2 + 1
    extra = rng.normal(size=(rows, features)) * 5
    z_fp = 1.5 * z_q[:, ::-1] * (1 + 0.2 * np.sign(z_q[:, :1])) + rng.normal(size=(rows, classes)) * 0.5
    inputs = np.concatenate([z_q, extra], axis=1)
    scale = np.array([1.0] * classes + [2.5] * features)
    start = start_of(clusters, classes, features, rng)

    mean = inputs.mean(axis=0)
    unit = np.sqrt(np.mean((z_q - z_q.mean(axis=0)) ** 2)) * scale
    white = np.concatenate([(inputs - mean) / unit, np.ones((rows, 1))], axis=1)
    label = start.assign(inputs)
    begun = start.apply(inputs) / temperature
    goal = softmax(z_fp / temperature, axis=1)
    shape = (1 + clusters, white.shape[1], classes)

    def logits(flat):
        change = flat.reshape(shape)
        moved = np.einsum("np,npc->nc", white, change[1 + label]) if clusters > 1 else 0.0
        return begun + white @ change[0] + moved

    def objective(flat):
        change = flat.reshape(shape)
        cross = -(goal * log_softmax(logits(flat), axis=1)).sum() / rows
        return cross + 0.5 * strength * ((change[0] ** 2).sum() + 4 * (change[1:] ** 2).sum())

    found = minimize(
        objective, np.zeros(np.prod(shape)), method="L-BFGS-B", options={"ftol": 1e-14, "maxfun": 10**6}
    )
    refined = refine_full(start, inputs, z_fp, scale, temperature, strength)
    np.testing.assert_allclose(refined.apply(inputs), logits(found.x) * temperature, atol=5e-3)
    assert refined.mode == "full"
    assert refined.alpha == start.alpha


def test_inputs_that_do_not_vary_change_nothing():
    rng = np.random.default_rng(0)
    start = start_of(1, 3, 0, rng)
    inputs = np.ones((20, 3))
    assert refine_full(start, inputs, rng.normal(size=(20, 3)), np.ones(3), 1.0, 0.1) is start


def test_softmax_and_divergence_survive_large_logits():
    z = np.random.default_rng(0).normal(size=(7, 4)) * 300 + 5000
    np.testing.assert_allclose(metrics.softmax(z), softmax(z, axis=1), rtol=1e-12)
    other = z[:, ::-1]
    expected = (softmax(z, axis=1) * (log_softmax(z, axis=1) - log_softmax(other, axis=1))).sum(axis=1)
    np.testing.assert_allclose(metrics.divergence(z * 2, other * 2, 2.0), expected, rtol=1e-9)
