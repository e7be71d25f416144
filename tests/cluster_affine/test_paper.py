"""The paper's method against its formulas, evaluated one cluster and one class at a time."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine import ClusterAffine
from tests.cluster_affine.reference import apply_rows, fit_paper


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    z_fp = rng.normal(size=(400, 7)) * 3
    z_q = z_fp @ (np.eye(7) + 0.2 * rng.normal(size=(7, 7))) + 0.3 * rng.normal(size=(400, 7)) + 1
    return z_q, z_fp


def test_paper_has_the_constants_of_the_paper():
    estimator = ClusterAffine.paper()
    assert (estimator.mode, estimator.n_clusters, estimator.alpha) == ("paper", 64, 0.4)
    assert estimator.n_components is None


def test_closed_form_is_the_least_squares_solution(logits):
    fitted = ClusterAffine.paper(n_clusters=6, random_state=0).fit(*logits)
    gamma, beta = fit_paper(*logits, fitted.parameters_.centroids)
    np.testing.assert_allclose(fitted.parameters_.gamma, gamma, rtol=1e-10)
    np.testing.assert_allclose(fitted.parameters_.beta, beta, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n_components", [None, 3])
def test_inference_is_the_formula(logits, n_components):
    fitted = ClusterAffine.paper(n_clusters=9, n_components=n_components, random_state=1).fit(*logits)
    expected = apply_rows(fitted.parameters_, logits[0])
    np.testing.assert_allclose(fitted.predict(logits[0]), expected, rtol=1e-11, atol=1e-12)


def test_alpha_zero_returns_the_logits(logits):
    fitted = ClusterAffine.paper(alpha=0.0, random_state=1).fit(*logits)
    np.testing.assert_array_equal(fitted.predict(logits[0]), logits[0])
