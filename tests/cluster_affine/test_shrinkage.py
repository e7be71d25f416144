"""Shrunk maps against ridge regression written on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine.shrinkage import CLUSTER_STRENGTHS, GLOBAL_STRENGTHS, Moments, shrink


def moments_of(x, y, label, clusters):
    count = np.bincount(label, minlength=clusters).astype(float)
    means_x, means_y, xx, xy, yy = [], [], [], [], []
    for k in range(clusters):
        a, b = x[label == k], y[label == k]
        mx, my = (v.mean(axis=0) if len(v) else np.zeros(v.shape[1]) for v in (a, b))
        a, b = a - mx, b - my
        means_x.append(mx)
        means_y.append(my)
        xx.append(a.T @ a)
        xy.append(a.T @ b)
        yy.append((b**2).sum(axis=0))
    arrays = (np.array(v)[None] for v in (means_x, means_y, xx, xy, yy))
    return Moments(count, *arrays)


def made(seed=0, rows=200, clusters=3, noise=0.5, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4)) * [1, 2, 0.5, 1] + offset
    label = rng.integers(0, clusters, size=rows)
    maps = np.eye(4) + 0.3 * rng.normal(size=(4, 4)) + 0.2 * rng.normal(size=(clusters, 4, 4))
    y = np.einsum("nd,ndc->nc", x - offset, maps[label]) + noise * rng.normal(size=(rows, 4)) + 1
    return x, y, label


def ridge_on_rows(x, y, prior, strength):
    """Ridge towards a prior with an unpenalised intercept, by augmented least squares; also its trace."""
    centred, target = x - x.mean(axis=0), y - y.mean(axis=0)
    penalty = strength * (centred**2).sum() / x.shape[1]
    a = np.concatenate([centred, np.sqrt(penalty) * np.eye(x.shape[1])])
    b = np.concatenate([target - centred @ prior, np.zeros((x.shape[1], y.shape[1]))])
    weight = prior + np.linalg.lstsq(a, b, rcond=None)[0]
    hat = centred @ np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T)
    return weight, 1.0 + np.trace(hat)


def test_global_map_is_ridge_with_the_best_gcv_score():
    x, y, label = made(rows=40, noise=3.0)
    got = shrink(moments_of(x, y, label * 0, 1), np.eye(4)[None])
    scores = []
    for strength in GLOBAL_STRENGTHS:
        weight, freedom = ridge_on_rows(x, y, np.eye(4), strength)
        residual = (y - y.mean(axis=0)) - (x - x.mean(axis=0)) @ weight
        scores.append((residual**2).sum() / (40 - freedom) ** 2)
    best = GLOBAL_STRENGTHS[int(np.argmin(scores))]
    assert got.global_strength == pytest.approx(best)
    weight, _ = ridge_on_rows(x, y, np.eye(4), best)
    np.testing.assert_allclose(got.weight[0, 0], weight, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        got.offset[0, 0], y.mean(axis=0) - x.mean(axis=0) @ weight, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("seed", range(3))
def test_cluster_maps_are_ridge_in_white_coordinates(seed):
    x, y, label = made(seed)
    got = shrink(moments_of(x, y, label, 3), np.eye(4)[None])
    pooled = shrink(moments_of(x, y, label * 0, 1), np.eye(4)[None])
    assert got.global_strength == pytest.approx(pooled.global_strength)
    residual = y - (x @ pooled.weight[0, 0] + pooled.offset[0, 0])
    centred = x - x.mean(axis=0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(centred.T @ centred / len(x))).T
    rows = np.concatenate([white, np.ones((len(x), 1))], axis=1)
    _, global_freedom = ridge_on_rows(x, y, np.eye(4), pooled.global_strength)

    def fitted(strength):
        out, freedom = np.zeros_like(y), global_freedom
        for k in range(3):
            a = rows[label == k]
            if np.isfinite(strength):
                inverse = np.linalg.inv(a.T @ a + strength * np.eye(5))
                out[label == k] = a @ inverse @ a.T @ residual[label == k]
                freedom += np.trace(a @ inverse @ a.T)
        return out, freedom

    scores = []
    for strength in CLUSTER_STRENGTHS:
        out, freedom = fitted(strength)
        scores.append(((residual - out) ** 2).sum() / (len(x) - freedom) ** 2)
    best = CLUSTER_STRENGTHS[int(np.argmin(scores))]
    assert got.cluster_strength == pytest.approx(best)
    expected = x @ pooled.weight[0, 0] + pooled.offset[0, 0] + fitted(best)[0]
    actual = np.einsum("nd,ndc->nc", x, got.weight[0][label]) + got.offset[0][label]
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-8)


def test_an_offset_changes_the_intercept_only():
    x, y, label = made(4)
    plain = shrink(moments_of(x, y, label, 3), np.eye(4)[None])
    moved = shrink(moments_of(x + 1e6, y, label, 3), np.eye(4)[None])
    np.testing.assert_allclose(moved.weight, plain.weight, rtol=1e-6, atol=1e-7)


def test_an_empty_cluster_gets_the_global_map():
    x, y, label = made(5)
    got = shrink(moments_of(x, y, label, 5), np.eye(4)[None])
    pooled = shrink(moments_of(x, y, label * 0, 1), np.eye(4)[None])
    np.testing.assert_allclose(got.weight[0, 4], pooled.weight[0, 0], rtol=1e-9)
    np.testing.assert_allclose(got.offset[0, 4], pooled.offset[0, 0], rtol=1e-9)


def test_pure_noise_is_shrunk_to_the_prior():
    shrunk, free = 0.0, 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(60, 4))
        y = x + 5 * rng.normal(size=(60, 4))
        got = shrink(moments_of(x, y, rng.integers(0, 4, 60), 4), np.eye(4)[None])
        least_squares = np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=None)[0]
        shrunk += ((got.weight[0].mean(axis=0) - np.eye(4)) ** 2).sum()
        free += ((least_squares - np.eye(4)) ** 2).sum()
    assert shrunk < 0.5 * free
