"""The summary of clusters, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.report.clusters import cluster_summary
from cat_plugin.report.svg.maps import enlargement


def test_cluster_summary_against_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(1)
    z = rng.normal(size=(300, 6)) * [5, 3, 1, 1, 1, 1]
    corrected, full = z + 0.5, z + 1.0
    labels = rng.integers(0, 3, 300)
    found = cluster_summary(z, corrected, labels, full)
    reference = PCA(2).fit(z)
    np.testing.assert_allclose(found["explained"], reference.explained_variance_ratio_, rtol=1e-6)
    placed = reference.transform(z)
    points = np.array(found["points"])
    np.testing.assert_allclose(np.abs(points[:, :2]), np.abs(placed), atol=1e-4)
    np.testing.assert_array_equal(points[:, 2], labels)
    for mean in found["means"]:
        expected = reference.transform(corrected[labels == mean["cluster"]]).mean(0)
        np.testing.assert_allclose(np.abs(mean["corrected"]), np.abs(expected), atol=1e-4)
    assert found["error"] == pytest.approx([1.0, 0.25])
    assert found["agreement"] == [1.0, 1.0]


def test_cluster_summary_of_one_class() -> None:
    found = cluster_summary(np.zeros((4, 1)), np.zeros((4, 1)), np.zeros(4, int))
    assert found["explained"] == [0.0, 0.0]
    assert enlargement(found) == 1
