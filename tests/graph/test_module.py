"""The module: equal to the numpy parameters, exportable, movable, saved by state_dict."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.cluster_affine.families import MAPS
from cat_plugin.graph import ClusterAffineModule
from tests.cluster_affine.reference import apply_rows, random_parameters

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    ),
]


def made(mode, seed=0, features=0):
    rng = np.random.default_rng(seed)
    parameters = random_parameters(mode, rng, features=features)
    return parameters, rng.normal(size=(24, 10)) * 3, rng.normal(size=(24, features)) if features else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", sorted(MAPS))
def test_equals_numpy(mode, device):
    parameters, logits, _ = made(mode)
    module = ClusterAffineModule(parameters).to(device)
    got = module(torch.from_numpy(logits).float().to(device)).cpu().numpy()
    expected = apply_rows(parameters, logits)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_equals_numpy_with_features():
    parameters, logits, features = made("full", features=5)
    module = ClusterAffineModule(parameters)
    assert module.n_features == 5
    got = module(torch.from_numpy(logits).float(), torch.from_numpy(features).float()).numpy()
    expected = apply_rows(parameters, logits, features)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("mode", sorted(MAPS))
def test_export_has_one_op_and_a_dynamic_batch(mode):
    parameters, logits, _ = made(mode)
    module = ClusterAffineModule(parameters).eval()
    x = torch.from_numpy(logits).float()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert len(calls) == 1
    assert str(calls[0].target).startswith("cat.cluster_affine")
    for rows in (1, 5, 24):
        torch.testing.assert_close(program.module()(x[:rows]), module(x[:rows]))


@pytest.mark.parametrize("mode", sorted(MAPS))
def test_state_dict_round_trip(mode):
    parameters, logits, _ = made(mode)
    other, _, _ = made(mode, seed=1)
    module, copy = ClusterAffineModule(parameters), ClusterAffineModule(other)
    x = torch.from_numpy(logits).float()
    assert not torch.equal(module(x), copy(x))
    copy.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), copy(x), rtol=0, atol=0)
    back = module.to_parameters()
    np.testing.assert_allclose(back.beta, parameters.beta, rtol=1e-6)


@pytest.mark.parametrize("mode", sorted(MAPS))
def test_autocast_changes_nothing(mode):
    parameters, logits, _ = made(mode)
    module = ClusterAffineModule(parameters)
    x = torch.from_numpy(logits).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, module(x), rtol=0, atol=0)


def test_half_module_computes_in_single():
    parameters, logits, _ = made("diagonal")
    x = torch.from_numpy(logits).float()
    half = ClusterAffineModule(parameters)(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), ClusterAffineModule(parameters)(x), rtol=1e-2, atol=2e-2)


def test_prints_what_it_was_fitted_to():
    parameters, *_ = made("full")
    clusters, classes = parameters.beta.shape
    shown = repr(ClusterAffineModule(parameters))
    assert f"mode='full', n_clusters={clusters}, n_classes={classes}" in shown
