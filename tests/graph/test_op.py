"""The ops against the definition, row by row in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.cluster_affine.families import MAPS
from cat_plugin.graph import op as _op  # noqa: F401
from tests.cluster_affine.reference import apply_rows, random_parameters

OPS = {mode: getattr(torch.ops.cat, applied.op) for mode, applied in MAPS.items()}


def arguments(parameters, logits, features=None, dtype=torch.float32):
    arrays = [torch.from_numpy(parameters.to_arrays()[name]).to(dtype) for name in parameters.map.arrays]
    first = [torch.from_numpy(logits).to(dtype)]
    if parameters.mode == "full":
        first.append(None if features is None else torch.from_numpy(features).to(dtype))
    return (*first, *arrays, parameters.alpha)


@pytest.mark.parametrize("mode", sorted(MAPS))
@pytest.mark.parametrize("components", [0, 4])
@pytest.mark.parametrize("clusters", [1, 5])
def test_against_rows(mode, components, clusters):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(33, 6)) if mode == "full" else None
    parameters = random_parameters(
        mode, rng, components=components, clusters=clusters, features=6 if mode == "full" else 0
    )
    logits = rng.normal(size=(33, 10)) * 4
    expected = apply_rows(parameters, logits, features)
    exact = OPS[mode](*arguments(parameters, logits, features, torch.float64))
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-11, atol=1e-11)
    single = OPS[mode](*arguments(parameters, logits, features)).numpy()
    assert np.abs(single - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["lowrank", "full"])
def test_large_maps_take_the_grouped_path(mode):
    rng = np.random.default_rng(2)
    parameters = random_parameters(mode, rng, classes=60, clusters=40, components=50, rank=40)
    logits = rng.normal(size=(70, 60))
    got = OPS[mode](*arguments(parameters, logits, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(got, apply_rows(parameters, logits), rtol=1e-11, atol=1e-11)


def test_centroids_may_use_the_leading_components_only():
    rng = np.random.default_rng(3)
    parameters = random_parameters("lowrank", rng)
    short = type(parameters)(**{**vars(parameters), "centroids": parameters.centroids[:, :2]})
    logits = rng.normal(size=(20, 10))
    got = OPS["lowrank"](*arguments(short, logits, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(got, apply_rows(short, logits), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", sorted(MAPS))
def test_ties_go_to_the_lowest_index(mode):
    rng = np.random.default_rng(4)
    parameters = random_parameters(mode, rng, classes=2, clusters=4, components=0)
    centroids = np.array([[8.0, 8.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    parameters = type(parameters)(**{**vars(parameters), "centroids": centroids})
    logits = np.array([[0.0, 0.0], [0.0, 2.0], [0.0, -3.0], [1.0, 0.0]])
    assert parameters.assign(logits).tolist() == [1, 1, 1, 1]
    got = OPS[mode](*arguments(parameters, logits, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(got, apply_rows(parameters, logits), rtol=1e-12)


@pytest.mark.parametrize("mode", sorted(MAPS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_inside(mode, dtype):
    rng = np.random.default_rng(5)
    parameters = random_parameters(mode, rng)
    logits = torch.from_numpy(rng.normal(size=(16, 10))).to(dtype)
    args = arguments(parameters, logits.double().numpy())
    wide = OPS[mode](*args)
    narrow = OPS[mode](logits, *args[1:])
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("mode", sorted(MAPS))
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_registration(mode, rows):
    rng = np.random.default_rng(6)
    parameters = random_parameters(mode, rng)
    args = arguments(parameters, rng.normal(size=(rows, 10)))
    torch.library.opcheck(OPS[mode].default, args)
    assert OPS[mode](*args).shape == (rows, 10)


@pytest.mark.parametrize("mode", sorted(MAPS))
def test_wrong_number_of_classes_is_refused(mode):
    rng = np.random.default_rng(7)
    args = arguments(random_parameters(mode, rng), rng.normal(size=(4, 9)))
    with pytest.raises(RuntimeError, match="9 classes"):
        OPS[mode](*args)


@pytest.mark.parametrize("mode", sorted(MAPS))
def test_other_shapes_and_integers_are_refused(mode):
    rng = np.random.default_rng(8)
    args = arguments(random_parameters(mode, rng), rng.normal(size=(4, 10)))
    with pytest.raises(RuntimeError, match=r"must have shape \(N, C\); got \(4,\)"):
        OPS[mode](args[0][:, 0], *args[1:])
    with pytest.raises(RuntimeError, match=r"must be floating point; got torch\.int64"):
        OPS[mode](args[0].long(), *args[1:])


def test_features_that_the_map_was_not_fitted_to_are_refused():
    rng = np.random.default_rng(9)
    args = arguments(random_parameters("full", rng), rng.normal(size=(4, 10)))
    assert args[1] is None
    with pytest.raises(RuntimeError, match="12 columns, the correction was fitted on 10"):
        OPS["full"](args[0], torch.ones(4, 2), *args[2:])
