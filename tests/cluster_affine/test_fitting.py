"""Plans, streams and candidates: what is decided once, and what is collected from batches after that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cat_plugin.cluster_affine import ClusterAffine, estimator
from cat_plugin.cluster_affine.families import Budget
from cat_plugin.cluster_affine.fitting import Settings, make_plan
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.selection import best_candidate, candidates, fold_of_rows
from cat_plugin.cluster_affine.shrinkage import Moments, shrink
from cat_plugin.cluster_affine.workbench import collect, collector
from tests.cluster_affine.conftest import distorted


def batches_of(arrays, size):
    return [tuple(a[start : start + size] for a in arrays) for start in range(0, len(arrays[0]), size)]


@pytest.fixture(scope="module")
def featured():
    """Logits and two features that know part of what quantization lost."""
    z_q, z_fp = distorted(500)
    features = (z_fp - z_q)[:, :2] + 0.1 * np.random.default_rng(3).normal(size=(500, 2))
    return z_q, z_fp, features


def test_features_come_with_the_batches(featured):
    z_q, z_fp, features = featured
    options = {"mode": "full", "n_clusters": 3, "alpha": 1.0, "random_state": 0}
    whole = ClusterAffine(**options).fit(z_q, z_fp, features=features)
    inside = ClusterAffine(**options).fit_batches(batches_of(featured, 90))
    np.testing.assert_allclose(
        inside.predict(z_q, features=features), whole.predict(z_q, features=features), rtol=1e-9
    )
    assert inside.n_features_in_ == z_q.shape[1]
    # With fewer rows kept than there are, the statistics come from a second pass over all of them.
    cut = ClusterAffine(**options).fit_batches(batches_of(featured, 90), sketch_rows=200)
    assert cut.n_rows_seen_ == 500
    with_features = np.mean((cut.predict(z_q, features=features) - z_fp) ** 2)
    plain = ClusterAffine(**options).fit(z_q, z_fp)
    assert with_features < 0.7 * np.mean((plain.predict(z_q) - z_fp) ** 2)


def test_a_stream_counts_its_rows_and_then_keeps_statistics_only(logits):
    fitted = ClusterAffine(mode="diagonal", n_clusters=2, random_state=0)
    for number, (z_q, z_fp) in enumerate(batches_of(logits, 100)):
        fitted.partial_fit(z_q, z_fp, sketch_rows=150)
        assert fitted.n_rows_seen_ == 100 * (number + 1)
        assert bool(fitted._stream._rows) == (number == 0)
    with pytest.raises(ValueError, match="row 630"):
        fitted.partial_fit(
            np.full((40, 6), np.where(np.arange(40) == 30, np.nan, 1.0)[:, None]), np.ones((40, 6))
        )


def test_the_limit_of_rows_counts_all_columns(featured, monkeypatch):
    asked = []
    monkeypatch.setattr(estimator, "row_limit", lambda width: asked.append(width) or 4096)
    z_q, z_fp, features = featured
    ClusterAffine(mode="diagonal", n_clusters=2).fit(z_q, z_fp, features=features)
    ClusterAffine(mode="diagonal", n_clusters=2).fit_batches([featured])
    ClusterAffine(mode="diagonal", n_clusters=2).partial_fit(z_q, z_fp, features=features)
    assert asked == [14, 14, 14]


def test_rows_that_the_quantizer_was_tuned_on_are_left_out_where_the_plan_says_so(logits):
    tuned = np.arange(600) % 3 == 0
    rows = Rows(*logits, None, tuned, None)
    plan = make_plan(rows, Settings("diagonal", 2, 1.0, None, 0))
    for kept, count in ((True, 600), (False, 400)):
        decided = replace(plan, candidate=replace(plan.candidate, tuned_rows=kept))
        into = collector(decided.problem())
        collect(into, decided.problem(), decided.fitted_rows(rows))
        assert into.result().n_rows == count


@pytest.mark.parametrize(
    ("limit", "rows", "each", "expected"),
    [(8, 1000, 4, [1, 2, 4, 8]), (6, 1000, 4, [1, 2, 4, 6]), (64, 100, 10, [1, 2, 4, 8]), (5, 3, 4, [1])],
)
def test_numbers_of_clusters_are_those_that_the_rows_can_fill(limit, rows, each, expected):
    budget = Budget(6, 0, rows, 64, None, 0.4)
    assert budget.cluster_counts(each, most=limit) == expected
    assert replace(budget, n_clusters=limit).cluster_counts(each) == expected


def listed(rows=400, classes=6, **options):
    z_q, z_fp = distorted(rows, classes)
    given = {"features": None, "tuned": None, "groups": None} | options
    return candidates(Rows(z_q, z_fp, **given), 8, 0.4, None)


def test_what_is_tried_depends_on_the_columns_and_the_rows():
    assert {c.n_components for c in listed(classes=64) if c.family == "diagonal"} == {None, 32}
    assert {c.n_components for c in listed(classes=65) if c.family == "diagonal"} == {32}
    assert {c.n_components for c in listed(classes=5) if c.family == "diagonal"} == {None}
    with_features = listed(features=np.zeros((400, 3)))
    full = [c for c in with_features if c.family == "full"]
    assert sorted(c.use_features for c in full) == sorted([False, True] * (len(full) // 2))
    assert len(set(full)) == len(full)
    # A tenth of the rows are fresh: no more clusters than five times these can fill.
    tuned = np.arange(400) >= 4
    few = listed(tuned=tuned)
    assert max(c.n_clusters for c in few if c.family == "diagonal") == 4
    assert {c.tuned_rows for c in few if c.family == "paper"} == {True, False}
    lowrank = [c for c in listed(rows=300, classes=40) if c.family == "lowrank"]
    assert {c.rank for c in lowrank} == {10, 20}
    assert {c.n_clusters for c in lowrank} == {1, 2, 4, 8}
    assert {c.n_clusters for c in listed(rows=50, classes=40) if c.family == "lowrank"} == {1, 2, 4}


def test_folds_are_numbers_of_folds(logits):
    for tuned in (None, np.arange(600) < 10):
        fold = fold_of_rows(Rows(*logits, None, tuned, None), 0)
        assert fold.dtype == np.intp
        assert np.bincount(fold + 1).tolist() == ([0] + [120] * 5 if tuned is None else [10] + [118] * 5)


def test_among_level_candidates_the_first_wins():
    kl = np.array([1.0, 0.5 * (1 + 1e-12), 0.5, 0.7])
    level = {f"mean_test_{name}": np.ones(4) for name in ("agreement", "confidence")}
    results = {**level, "mean_test_kl": kl, "mean_test_mse": kl, "error_test_kl": np.zeros(4)}
    assert best_candidate(results) == 1
    assert results["rank_test_score"].tolist() == [4, 1, 2, 3]


def test_problems_side_by_side_do_not_see_each_others_units():
    """A regressor in another unit has its slope in that unit, whatever stands beside it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 30, 1))
    y = 2 * x[..., 0] + rng.normal(size=(3, 30))
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1, keepdims=True)
    dx, dy = x - mean_x[:, None], (y - mean_y)[..., None]
    xx, xy, yy = (np.swapaxes(a, 1, 2) @ b for a, b in ((dx, dx), (dx, dy), (dy, dy)))
    unit = np.array([1.0, 1e4])
    moments = Moments(
        np.full(3, 30.0),
        mean_x * unit[:, None, None],
        np.stack([mean_y, mean_y]),
        xx * unit[:, None, None, None] ** 2,
        xy * unit[:, None, None, None],
        np.stack([yy[..., 0], yy[..., 0]]),
    )
    maps = shrink(moments, np.zeros((2, 1, 1)))
    np.testing.assert_allclose(maps.weight[1] * 1e4, maps.weight[0], rtol=1e-9)
    np.testing.assert_allclose(maps.offset[1], maps.offset[0], rtol=1e-9)


def test_infinite_logits_are_named_in_prediction(logits):
    fitted = ClusterAffine(mode="diagonal", n_clusters=2).fit(*logits)
    bad = logits[0].copy()
    bad[17, 2] = np.inf
    with pytest.raises(ValueError, match=r"z_q \(X\) contains infinity in row 17, column 2"):
        fitted.predict(bad)


@pytest.mark.parametrize(("n_components", "rank"), [(None, 3), (1, 1), (2, 2), (50, 6)])
def test_the_rank_of_a_lowrank_map_is_that_of_its_components(logits, n_components, rank):
    options = {"n_clusters": 4, "alpha": 1.0, "n_components": n_components, "random_state": 0}
    lowrank = ClusterAffine(mode="lowrank", **options).fit(*logits)
    assert lowrank.parameters_.core.shape == (4, rank, rank)
    assert lowrank.parameters_.right.shape == (rank, 6)
    if rank > 1:  # what mixes classes is beyond a diagonal map
        diagonal = ClusterAffine(mode="diagonal", **options).fit(*logits)
        left = [np.mean((each.predict(logits[0]) - logits[1]) ** 2) for each in (lowrank, diagonal)]
        assert left[0] < 0.95 * left[1]


def test_a_second_fit_forgets_the_comparison_of_the_first(logits):
    fitted = ClusterAffine(n_clusters=2, random_state=0).fit(*(each[:120] for each in logits))
    assert fitted.best_params_ == fitted.cv_results_["params"][fitted.best_index_]
    fitted.set_params(mode="diagonal").fit(*logits)
    for name in ("cv_results_", "best_index_", "best_params_"):
        assert not hasattr(fitted, name)
    assert fitted.n_rows_seen_ == 600


@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_row_of_a_later_batch_is_named_by_its_place_in_the_stream(logits, which):
    batches = [[each.copy() for each in batch] for batch in batches_of(logits, 100)]
    batches[3][which][7, 2] = np.nan
    name = ("z_q", "z_fp")[which]
    with pytest.raises(ValueError, match=rf"{name} \([Xy]\) contains NaN in row 307, column 2"):
        ClusterAffine(mode="diagonal", n_clusters=2, random_state=0).fit_batches(batches)


def test_only_the_modes_that_blend_by_a_fixed_alpha_may_score_badly():
    poor = {
        mode: ClusterAffine(mode=mode).__sklearn_tags__().regressor_tags.poor_score
        for mode in ("auto", "full")
    }
    assert poor == {"auto": False, "full": True}
