"""What must hold for any data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cat_plugin.cluster_affine import ClusterAffine
from tests.cluster_affine.conftest import distorted

MODES = ("diagonal", "lowrank", "full")
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 10_000)


def made(mode, seed=0):
    return ClusterAffine(mode, n_clusters=4, alpha=0.8, random_state=seed)


@FEW
@given(seeds, st.sampled_from(MODES))
def test_permuting_the_rows_changes_nothing_but_rounding(seed, mode):
    z_q, z_fp = distorted(90, classes=4, seed=seed)
    order = np.random.default_rng(seed + 1).permutation(90)
    first = made(mode).fit(z_q, z_fp).predict(z_q)
    second = made(mode).fit(z_q[order], z_fp[order]).predict(z_q)
    np.testing.assert_allclose(second, first, rtol=1e-9, atol=1e-9)


@settings(max_examples=4, deadline=None)
@given(seeds)
def test_permuting_the_rows_changes_nothing_in_auto_mode(seed):
    z_q, z_fp = distorted(120, classes=4, seed=seed)
    order = np.random.default_rng(seed + 1).permutation(120)
    first = ClusterAffine(n_clusters=4, random_state=0).fit(z_q, z_fp)
    second = ClusterAffine(n_clusters=4, random_state=0).fit(z_q[order], z_fp[order])
    assert first.best_params_ == second.best_params_
    np.testing.assert_allclose(second.predict(z_q), first.predict(z_q), rtol=1e-9, atol=1e-9)


@FEW
@given(seeds, st.sampled_from((*MODES, "paper")), st.floats(1e-3, 1e3))
def test_scaling_both_logits_scales_the_output(seed, mode, factor):
    z_q, z_fp = distorted(90, classes=4, seed=seed)
    first = made(mode).fit(z_q, z_fp).predict(z_q)
    second = made(mode).fit(factor * z_q, factor * z_fp).predict(factor * z_q)
    np.testing.assert_allclose(second, factor * first, rtol=1e-7, atol=1e-7 * factor)


@settings(max_examples=4, deadline=None)
@given(seeds, st.sampled_from([0.01, 3.0, 250.0]))
def test_scaling_both_logits_scales_the_output_in_auto_mode(seed, factor):
    z_q, z_fp = distorted(120, classes=4, seed=seed)
    first = ClusterAffine(n_clusters=4, random_state=0).fit(z_q, z_fp)
    second = ClusterAffine(n_clusters=4, random_state=0).fit(factor * z_q, factor * z_fp)
    assert first.best_params_ == second.best_params_
    np.testing.assert_allclose(
        second.predict(factor * z_q), factor * first.predict(z_q), rtol=1e-6, atol=1e-6 * factor
    )


@FEW
@given(seeds, st.sampled_from((*MODES, "paper", "auto")))
def test_identity_data_give_the_identity(seed, mode):
    z, _ = distorted(90, classes=4, seed=seed)
    corrected = made(mode).fit(z, z).predict(z)
    np.testing.assert_allclose(corrected, z, rtol=1e-7, atol=1e-7)


@FEW
@given(seeds, st.integers(1, 200), st.sampled_from((*MODES, "paper")))
def test_batches_are_the_whole(seed, size, mode):
    z_q, z_fp = distorted(150, classes=4, seed=seed)
    batches = [(z_q[i : i + size], z_fp[i : i + size]) for i in range(0, 150, size)]
    whole = made(mode).fit(z_q, z_fp).predict(z_q)
    np.testing.assert_allclose(made(mode).fit_batches(batches).predict(z_q), whole, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        made(mode).fit_batches(iter(batches)).predict(z_q), whole, rtol=1e-9, atol=1e-9
    )


@FEW
@given(seeds, st.permutations(range(5)), st.sampled_from(MODES))
def test_order_of_a_stream_does_not_matter(seed, order, mode):
    z_q, z_fp = distorted(250, classes=4, seed=seed)
    batches = [(z_q[i : i + 50], z_fp[i : i + 50]) for i in range(0, 250, 50)]
    first = made(mode).fit_batches(batches, sketch_rows=100).predict(z_q)
    second = made(mode).fit_batches([batches[i] for i in order], sketch_rows=100).predict(z_q)
    np.testing.assert_allclose(second, first, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", [*MODES, "paper", "auto"])
def test_duplicated_rows_are_no_trouble(mode):
    z_q, z_fp = distorted(40, classes=4)
    twice = made(mode).fit(np.repeat(z_q, 3, axis=0), np.repeat(z_fp, 3, axis=0))
    assert np.isfinite(twice.predict(z_q)).all()
    if mode == "paper":
        once = made(mode).fit(z_q, z_fp)
        assert once.parameters_.n_clusters == twice.parameters_.n_clusters


def mixed(seed: int, rows: int = 400, classes: int = 24, groups: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits in groups, each of which was distorted by a map of its own; the maps cancel on average."""
    rng = np.random.default_rng(seed)
    which = np.arange(rows) % groups
    basis = rng.standard_normal((9, classes))
    z_q = (3 * rng.standard_normal((groups, 9))[which] + rng.standard_normal((rows, 9))) @ basis
    maps = 0.1 * rng.standard_normal((groups, classes, 3)) @ rng.standard_normal((groups, 3, classes))
    maps -= maps.mean(0)
    mean = np.stack([z_q[which == k].mean(0) for k in range(groups)])
    moved = np.einsum("nc,ncd->nd", z_q - mean[which], maps[which])
    return z_q, z_q + moved + 0.01 * rng.standard_normal(z_q.shape)


@FEW
@given(seeds, st.sampled_from(MODES), st.sampled_from([1, 4, 9]), st.sampled_from([None, 2, 6]))
def test_no_map_errs_more_on_what_it_was_fitted_to_than_none(seed, mode, clusters, components):
    z_q, z_fp = mixed(seed)
    options = {"n_clusters": clusters, "n_components": components, "alpha": 1.0, "random_state": 0}
    found = ClusterAffine(mode, **options).fit(z_q, z_fp).predict(z_q)
    assert np.mean((found - z_fp) ** 2) <= np.mean((z_q - z_fp) ** 2) * (1 + 1e-9)


def test_maps_of_low_rank_tell_clusters_apart_that_cancel_on_average():
    """Four maps of rank three: twelve directions hold all that they do, though the mean of the maps is nothing."""
    z_q, z_fp = mixed(0)
    left = {}
    for components in (2, 12, 20):
        estimator = ClusterAffine(
            "lowrank", n_clusters=4, n_components=components, alpha=1.0, random_state=0
        ).fit(z_q, z_fp)
        left[components] = np.mean((estimator.predict(z_q) - z_fp) ** 2) / np.mean((z_q - z_fp) ** 2)
    assert left[2] > left[12] > left[20]
    assert left[20] < 0.1


def test_maps_of_low_rank_have_their_rank_where_there_is_nothing_to_map():
    z = np.random.default_rng(0).standard_normal((300, 90))
    for clusters in (1, 8):
        options = {"n_clusters": clusters, "n_components": 10, "alpha": 1.0, "random_state": 0}
        estimator = ClusterAffine("lowrank", **options).fit(z, z)
        right = estimator.parameters_.right
        np.testing.assert_allclose(right @ right.T, np.eye(10), atol=1e-6)
        np.testing.assert_allclose(estimator.predict(z), z, atol=1e-9)
