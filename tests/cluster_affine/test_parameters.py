"""Parameters as arrays and back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine import AffineParameters, ClusterAffine
from cat_plugin.errors import CATValueError
from tests.cluster_affine.reference import apply_rows, random_parameters


@pytest.mark.parametrize("mode", ["diagonal", "lowrank", "full"])
def test_arrays_and_back(mode):
    given = random_parameters(mode, np.random.default_rng(0), features=2 if mode == "full" else 0)
    again = AffineParameters.from_arrays(mode, given.to_arrays())
    assert again.alpha == given.alpha
    assert (again.n_clusters, again.n_classes, again.n_features) == (5, 10, 2 if mode == "full" else 0)
    for name, array in given.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], array)


def test_arrays_that_do_not_belong_together():
    arrays = random_parameters("diagonal", np.random.default_rng(0)).to_arrays()
    with pytest.raises(CATValueError, match="missing: beta, alpha; unknown: bias, weight"):
        AffineParameters.from_arrays(
            "diagonal",
            {"weight": np.ones(1), "bias": np.ones(1)}
            | {k: v for k, v in arrays.items() if k not in ("beta", "alpha")},
        )
    with pytest.raises(CATValueError, match="missing: none; unknown: weight"):
        AffineParameters.from_arrays("diagonal", arrays | {"weight": np.ones(1)})
    with pytest.raises(CATValueError, match=r"alpha has shape \(2,\)"):
        AffineParameters.from_arrays("diagonal", arrays | {"alpha": np.ones(2)})
    with pytest.raises(CATValueError, match="mode is 'bold'; it must be one of diagonal, full, lowrank"):
        AffineParameters.from_arrays("bold", arrays)


@pytest.mark.parametrize(
    ("mode", "name", "shape", "expected"),
    [
        ("diagonal", "gamma", (5, 9), r"\(5, 10\)"),
        ("diagonal", "components", (4, 9), r"\(4, 10\)"),
        ("diagonal", "centroids", (5, 6), r"\(5, 4\)"),
        ("full", "weight", (5, 10, 9), r"\(5, 10, 10\)"),
        ("lowrank", "core", (5, 3, 3), r"\(5, 4, 3\)"),
        ("lowrank", "right", (3, 9), r"\(3, 10\)"),
    ],
)
def test_shapes_fit_each_other(mode, name, shape, expected):
    given = vars(random_parameters(mode, np.random.default_rng(0)))
    with pytest.raises(CATValueError, match=rf"the array '{name}' has shape .*must have {expected}"):
        AffineParameters(**{**given, name: np.zeros(shape)})


def test_the_arrays_of_a_mode_are_given_and_no_others():
    given = vars(random_parameters("diagonal", np.random.default_rng(0)))
    with pytest.raises(CATValueError, match="needs the array 'gamma'"):
        AffineParameters(**{**given, "gamma": None})
    with pytest.raises(CATValueError, match="has no array 'weight'"):
        AffineParameters(**{**given, "weight": np.zeros((5, 10, 10))})
    with pytest.raises(CATValueError, match="mode is 'bold'"):
        AffineParameters(**{**given, "mode": "bold"})


@pytest.mark.parametrize("mode", ["diagonal", "lowrank", "full"])
@pytest.mark.parametrize("components", [0, 4])
def test_a_wider_map_does_the_same_and_ignores_the_features(mode, components):
    rng = np.random.default_rng(1)
    given = random_parameters(mode, rng, components=components)
    z, features = rng.normal(size=(40, 10)), rng.normal(size=(40, 3)) * 100
    wide = given.widened(3)
    assert (wide.mode, wide.n_features) == ("full", 3)
    np.testing.assert_allclose(
        wide.apply(np.concatenate([z, features], axis=1)), apply_rows(given, z), rtol=1e-9, atol=1e-9
    )
    if mode == "full":
        assert given.widened(0) is given


def test_an_estimator_without_a_fit_has_no_parameters():
    with pytest.raises(AttributeError, match="not fitted yet"):
        ClusterAffine().parameters_  # noqa: B018
