"""What ``mode="auto"`` promises, and what features, masks and groups do."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.cluster_affine.metrics import divergence, natural_temperature
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.selection import N_FOLDS, _standard_error, best_candidate, fold_of_rows
from tests.cluster_affine.conftest import distorted


@pytest.fixture(scope="module")
def fitted():
    z_q, z_fp = distorted(500)
    return ClusterAffine(n_clusters=8, alpha=0.35, random_state=0).fit(z_q[:300], z_fp[:300]), z_q, z_fp


def test_the_table_has_the_conventional_layout(fitted):
    results = fitted[0].cv_results_
    count = len(results["params"])
    for metric in ("kl", "agreement", "confidence", "mse"):
        splits = np.stack([results[f"split{i}_test_{metric}"] for i in range(N_FOLDS)])
        assert splits.shape == (N_FOLDS, count)
        np.testing.assert_allclose(results[f"mean_test_{metric}"], splits.mean(axis=0))
        np.testing.assert_allclose(results[f"std_test_{metric}"], splits.std(axis=0), atol=1e-12)
        assert results[f"error_test_{metric}"][0] == 0
        assert (results[f"error_test_{metric}"][1:] >= 0).all()
    assert sorted(results["rank_test_score"])[0] == 1
    assert fitted[0].best_params_ == results["params"][fitted[0].best_index_]
    assert results["rank_test_score"][fitted[0].best_index_] == 1


def test_settings_bound_the_candidates(fitted):
    results = fitted[0].cv_results_
    assert max(results["param_n_clusters"]) == 8
    assert 0.35 in set(results["param_alpha"])
    assert {"identity", "paper", "diagonal", "full"} <= set(results["param_family"])
    assert results["param_family"][0] == "identity"


def test_the_winner_is_no_worse_than_the_identity_on_held_out_folds(fitted):
    results, best = fitted[0].cv_results_, fitted[0].best_index_
    gain = results["mean_test_kl"][0] - results["mean_test_kl"][best]
    assert gain > results["error_test_kl"][best] > 0
    assert results["mean_test_agreement"][best] >= results["mean_test_agreement"][0]
    assert results["mean_test_confidence"][best] >= results["mean_test_confidence"][0]


@pytest.mark.parametrize(
    ("worse", "error", "winner"),
    [(None, 0.01, 1), (None, 0.04, 0), ("agreement", 0.01, 0), ("confidence", 0.01, 0)],
)
def test_a_gain_within_its_standard_error_or_of_worse_classes_is_none(worse, error, winner):
    results = {f"mean_test_{name}": np.array([0.8, 0.8]) for name in ("agreement", "confidence")}
    results |= {"mean_test_kl": np.array([0.5, 0.47]), "mean_test_mse": np.array([2.0, 1.0])}
    results["error_test_kl"] = np.array([0.0, error])
    if worse is not None:
        results[f"mean_test_{worse}"][1] -= 0.001
    assert best_candidate(results) == winner


def test_the_standard_error_is_that_of_paired_differences_of_groups():
    difference = np.random.default_rng(0).normal(size=(2, 50))
    expected = difference.std(axis=1, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(_standard_error(difference, np.arange(50)), expected)
    # Rows that are copies of each other say nothing more; groups that are never held out say nothing.
    groups = np.repeat(np.arange(50), 3)
    padded = np.concatenate([3 * difference, np.zeros((2, 4))], axis=1)
    np.testing.assert_allclose(_standard_error(padded, groups), expected)
    assert np.isinf(_standard_error(difference[:, :1], np.zeros(1, dtype=np.intp))).all()


def test_scores_of_the_identity_are_those_of_the_raw_logits(fitted):
    estimator, z_q, z_fp = fitted
    z_q, z_fp = z_q[:300], z_fp[:300]
    expected = divergence(z_fp, z_q, 0.3 * natural_temperature(z_fp)).mean()
    assert estimator.cv_results_["mean_test_kl"][0] == pytest.approx(expected)
    same = np.mean(z_fp.argmax(axis=1) == z_q.argmax(axis=1))
    assert estimator.cv_results_["mean_test_agreement"][0] == pytest.approx(same)


def test_divergence_is_that_of_scipy():
    from scipy.special import rel_entr, softmax

    a, b = np.random.default_rng(0).normal(size=(2, 20, 5)) * 10
    expected = rel_entr(softmax(a / 3, axis=1), softmax(b / 3, axis=1)).sum(axis=1)
    np.testing.assert_allclose(divergence(a, b, 3.0), expected)


def test_it_helps_on_new_rows_and_beats_the_paper(fitted):
    estimator, z_q, z_fp = fitted
    temperature = 0.3 * natural_temperature(z_fp)
    new_q, new_fp = z_q[300:], z_fp[300:]

    def distance(z):
        return divergence(new_fp, z, temperature).mean()

    paper = ClusterAffine.paper(n_clusters=8).fit(z_q[:300], z_fp[:300])
    assert distance(estimator.predict(new_q)) < distance(paper.predict(new_q)) < distance(new_q)


def test_it_leaves_alone_what_it_cannot_improve():
    # The targets have nothing to do with the logits but for being them plus noise of their own.
    rng = np.random.default_rng(0)
    z_q = 4 * rng.normal(size=(60, 5))
    fitted = ClusterAffine(random_state=0, n_clusters=16).fit(z_q, z_q + 0.01 * rng.normal(size=(60, 5)))
    np.testing.assert_allclose(fitted.predict(z_q), z_q, atol=0.2)


def test_a_seed_makes_it_deterministic(fitted):
    estimator, z_q, z_fp = fitted
    again = ClusterAffine(n_clusters=8, alpha=0.35, random_state=0).fit(z_q[:300], z_fp[:300])
    np.testing.assert_array_equal(again.predict(z_q), estimator.predict(z_q))
    for name in ("mean_test_kl", "rank_test_score"):
        np.testing.assert_array_equal(again.cv_results_[name], estimator.cv_results_[name])


def test_features_that_know_more_are_used():
    z_q, z_fp = distorted(500, noise=2.0)
    hidden = np.tanh(z_fp) + 0.05 * np.random.default_rng(1).normal(size=z_fp.shape)
    plain = ClusterAffine(n_clusters=4, random_state=0).fit(z_q[:300], z_fp[:300])
    informed = ClusterAffine(n_clusters=4, random_state=0).fit(z_q[:300], z_fp[:300], features=hidden[:300])
    assert informed.best_params_["use_features"]
    assert informed.parameters_.mode == "full"
    assert informed.parameters_.n_features == 6
    errors = [
        np.mean((z - z_fp[300:]) ** 2)
        for z in (plain.predict(z_q[300:]), informed.predict(z_q[300:], hidden[300:]))
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("mode", ["paper", "diagonal", "lowrank", "full"])
def test_size_and_offset_of_features_do_not_matter(mode):
    z_q, z_fp = distorted(200)
    features = np.random.default_rng(1).normal(size=(200, 3))
    first = ClusterAffine(mode, n_clusters=3, random_state=0).fit(z_q, z_fp, features=features)
    other = 1e4 * features + 7e4
    second = ClusterAffine(mode, n_clusters=3, random_state=0).fit(z_q, z_fp, features=other)
    np.testing.assert_allclose(second.predict(z_q, other), first.predict(z_q, features), rtol=1e-6, atol=1e-6)
    if mode in ("paper", "diagonal", "lowrank"):
        # Modes that cannot use them accept them all the same, and do what they do without.
        alone = ClusterAffine(mode, n_clusters=3, random_state=0).fit(z_q, z_fp).predict(z_q)
        np.testing.assert_allclose(first.predict(z_q, features), alone, rtol=1e-9, atol=1e-9)


def test_tuned_rows_are_never_held_out_and_are_dropped_if_they_mislead():
    z_q, z_fp = distorted(1000)
    new_q, new_fp, z_q, z_fp = z_q[600:], z_fp[600:], z_q[:600], z_fp[:600]
    tuned = np.arange(600) < 300
    # What a reconstruction does to the rows that it was tuned on, in the extreme: no error is left.
    z_q[tuned] = z_fp[tuned]
    naive = ClusterAffine(n_clusters=4, random_state=0).fit(z_q, z_fp)
    told = ClusterAffine(n_clusters=4, random_state=0).fit(z_q, z_fp, tuned_mask=tuned)
    assert not told.best_params_["tuned_rows"]
    # Judged by fresh rows alone: the identity's score is that of the fresh rows.
    fresh = np.mean(z_q[~tuned].argmax(axis=1) == z_fp[~tuned].argmax(axis=1))
    assert told.cv_results_["mean_test_agreement"][0] == pytest.approx(fresh)
    error = [np.mean((e.predict(new_q) - new_fp) ** 2) for e in (naive, told)]
    assert error[1] < error[0]


def test_folds_keep_groups_together_and_are_even():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, size=300)
    rows = Rows(np.zeros((300, 2)), np.zeros((300, 2)), groups=groups)
    fold = fold_of_rows(rows, seed=0)
    assert all(len(set(fold[groups == g])) == 1 for g in set(groups))
    sizes = np.bincount(fold)
    assert len(sizes) == N_FOLDS
    assert sizes.max() - sizes.min() <= np.bincount(groups).max()
    plain = np.bincount(fold_of_rows(Rows(np.zeros((302, 2)), np.zeros((302, 2))), seed=0))
    assert plain.max() - plain.min() <= 1


def test_groups_unmask_what_repeated_rows_hide():
    # Each row ten times: without groups a fold holds copies of what it was fitted on.
    z_q, z_fp = distorted(40, noise=2.0)
    z_q, z_fp = np.repeat(z_q, 10, axis=0), np.repeat(z_fp, 10, axis=0)
    groups = np.repeat(np.arange(40), 10)
    blind = ClusterAffine(n_clusters=16, random_state=0).fit(z_q, z_fp)
    told = ClusterAffine(n_clusters=16, random_state=0).fit(z_q, z_fp, groups=groups)
    assert blind.cv_results_["mean_test_kl"].min() < 0.8 * told.cv_results_["mean_test_kl"].min()


def test_many_classes_are_given_low_rank_candidates():
    z_q, z_fp = distorted(200, classes=300)
    fitted = ClusterAffine(n_clusters=4, random_state=0).fit(z_q, z_fp)
    families = set(fitted.cv_results_["param_family"])
    assert "lowrank" in families
    assert "full" not in families
    assert fitted.predict(z_q).shape == (200, 300)
