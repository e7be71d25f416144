"""Input that cannot be used is refused with a message that helps; input that is merely odd is not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.errors import CATError, CATTypeError, CATValueError
from tests.cluster_affine.conftest import distorted

MODES = ("auto", "paper", "diagonal", "lowrank", "full")


def made(mode="auto", **settings):
    return ClusterAffine(mode, **{"n_clusters": 4, "random_state": 0} | settings)


def test_different_classes_are_refused(logits):
    with pytest.raises(CATValueError, match="6 columns and z_fp has 5"):
        made().fit(logits[0], logits[1][:, :5])


def test_different_numbers_of_rows_are_refused(logits):
    with pytest.raises(CATValueError, match="inconsistent numbers of samples"):
        made().fit(logits[0], logits[1][:-1])


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_values_are_refused_with_their_row(logits, value, word, which):
    pair = [part.copy() for part in logits]
    pair[which][17, 3] = value
    name = ("z_q", "z_fp")[which]
    with pytest.raises(CATValueError, match=rf"{name}.*{word} in row 17, column 3"):
        made().fit(*pair)
    with pytest.raises(CATValueError, match=rf"{name}.*{word} in row 17, column 3"):
        made().fit_batches([(pair[0][:10], pair[1][:10]), (pair[0][10:], pair[1][10:])])


def test_non_finite_values_are_refused_in_prediction_and_features(logits):
    fitted = made("full").fit(*logits, features=logits[0][:, :2])
    bad = logits[0].copy()
    bad[5, 0] = np.nan
    with pytest.raises(CATValueError, match="row 5, column 0"):
        fitted.predict(bad, logits[0][:, :2])
    with pytest.raises(CATValueError, match="features contains NaN in row 5"):
        fitted.predict(logits[0], bad[:, :2])


def test_large_finite_values_are_not_mistaken_for_infinity():
    z = np.full((20, 3), 1e308)
    z[:, 0] = np.linspace(0, 1, 20)
    from cat_plugin.cluster_affine.validation import refuse_non_finite

    refuse_non_finite(z, "z")


def test_fewer_samples_than_clusters_warns_and_reduces():
    z_q, z_fp = distorted(10)
    for mode in MODES:
        with pytest.warns(UserWarning, match="n_clusters=64 is more than the 10 rows"):
            fitted = made(mode, n_clusters=64).fit(z_q, z_fp)
        assert fitted.parameters_.n_clusters <= 10


@pytest.mark.parametrize("mode", MODES)
def test_constant_logits(mode):
    z = np.full((30, 4), 2.5)
    assert np.allclose(made(mode).fit(z, z).predict(z), z)
    _, z_fp = distorted(30, classes=4)
    assert np.isfinite(made(mode).fit(z, z_fp).predict(z)).all()


@pytest.mark.parametrize("mode", MODES)
def test_one_class(mode):
    z_q, z_fp = distorted(80, classes=1)
    fitted = made(mode).fit(z_q, z_fp)
    assert fitted.predict(z_q).shape == (80, 1)
    error = np.mean((fitted.predict(z_q) - z_fp) ** 2)
    assert error < np.mean((z_q - z_fp) ** 2)


@pytest.mark.parametrize("mode", MODES)
def test_one_row(mode):
    with pytest.warns(UserWarning, match="more than the 1 rows"):
        fitted = made(mode).fit([[1.0, 2.0, 3.0]], [[1.5, 2.5, 3.5]])
    assert np.isfinite(fitted.predict([[1.0, 2.0, 3.0]])).all()


@pytest.mark.parametrize("mode", MODES)
def test_half_precision(mode, logits):
    z_q, z_fp = (part.astype(np.float16) for part in logits)
    half = made(mode).fit(z_q, z_fp)
    wide = made(mode).fit(z_q.astype(np.float64), z_fp.astype(np.float64))
    got = half.predict(z_q)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wide.predict(z_q.astype(np.float64)), rtol=1e-3, atol=1e-3)


def test_large_half_precision_does_not_overflow():
    z_q, z_fp = distorted(200)
    fitted = made("full").fit((z_q * 5000).astype(np.float16), (z_fp * 3000).astype(np.float16))
    assert np.isfinite(fitted.predict((z_q * 5000).astype(np.float16))).all()


def test_tensors_bfloat16_among_them(logits):
    torch = pytest.importorskip("torch")
    z_q, z_fp = (torch.from_numpy(part).to(torch.bfloat16) for part in logits)
    fitted = made("full").fit(z_q, z_fp)
    wide = made("full").fit(z_q.double().numpy(), z_fp.double().numpy())
    np.testing.assert_allclose(fitted.predict(z_q), wide.predict(z_q.float().numpy()), rtol=1e-5, atol=1e-5)


def test_empty_batches_are_skipped_and_nothing_but_them_refused(logits):
    z_q, z_fp = logits
    empty = (z_q[:0], z_fp[:0])
    batches = [empty, (z_q[:300], z_fp[:300]), empty, (z_q[300:], z_fp[300:])]
    expected = made("full").fit(z_q, z_fp).predict(z_q)
    np.testing.assert_allclose(made("full").fit_batches(batches).predict(z_q), expected)
    np.testing.assert_allclose(made("full").fit_batches(iter(batches)).predict(z_q), expected)
    for nothing in ([], [empty], iter([]), iter([empty])):
        with pytest.raises(CATValueError, match="no rows"):
            made().fit_batches(nothing)
    with pytest.raises(CATValueError, match="0 sample"):
        made().fit(*empty)
    assert made("full").fit(z_q, z_fp).predict(z_q[:0]).shape == (0, 6)


def test_an_empty_cluster_is_the_identity():
    from cat_plugin.cluster_affine.families.paper import closed_form
    from cat_plugin.cluster_affine.statistics import StatisticsAccumulator

    z_q, z_fp = distorted(20, classes=3)
    accumulator = StatisticsAccumulator(3, 3)
    accumulator.add(z_q, z_fp, np.full(20, 1))
    gamma, beta = closed_form(accumulator.result())
    np.testing.assert_array_equal(gamma[[0, 2]], 1.0)
    np.testing.assert_array_equal(beta[[0, 2]], 0.0)
    assert not np.allclose(gamma[1], 1.0)


def test_a_cluster_that_empties_in_a_stream_stays_finite():
    # Clusters are found on a sample; one of them may have no row at all in what follows.
    z_q, z_fp = distorted(400, classes=3)
    fitted = made("diagonal", n_clusters=30).partial_fit(z_q[:60], z_fp[:60], sketch_rows=50)
    for start in range(60, 400, 40):
        fitted.partial_fit(z_q[start : start + 40], z_fp[start : start + 40], sketch_rows=50)
    assert np.isfinite(fitted.predict(z_q)).all()


def test_sparse_input_is_refused(logits):
    sparse = scipy.sparse.csr_matrix(logits[0])
    for call in (lambda: made().fit(sparse, logits[1]), lambda: made().fit(logits[0], sparse)):
        with pytest.raises(CATTypeError, match=r"[sS]parse"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "must be one of auto"),
        ({"n_clusters": 0}, "at least 1"),
        ({"n_clusters": 2.5}, "integer"),
        ({"alpha": 1.5}, "between 0"),
        ({"alpha": float("nan")}, "between 0"),
        ({"n_components": 0}, "at least 1"),
    ],
)
def test_unusable_settings_are_refused_when_fitting_starts(logits, settings, message):
    estimator = ClusterAffine(**settings)
    with pytest.raises(CATValueError, match=message):
        estimator.fit(*logits)


def test_features_must_come_with_the_logits(logits):
    fitted = made("full").fit(*logits, features=logits[0][:, :2])
    with pytest.raises(CATValueError, match="fitted with 2 features"):
        fitted.predict(logits[0])
    with pytest.raises(CATValueError, match="3 columns"):
        fitted.predict(logits[0], logits[0][:, :3])
    with pytest.raises(CATValueError, match="rows"):
        fitted.predict(logits[0], logits[0][:5, :2])
    with pytest.raises(CATValueError, match="fitted without features"):
        made("full").fit(*logits).predict(logits[0], logits[0][:, :2])


def test_masks_must_have_one_value_per_row(logits):
    with pytest.raises(CATValueError, match="tuned_mask has shape"):
        made().fit(*logits, tuned_mask=[True, False])
    with pytest.raises(CATValueError, match="groups has shape"):
        made().fit(*logits, groups=np.zeros((600, 2)))


def test_batches_must_be_pairs(logits):
    with pytest.raises(CATValueError, match="expected \\(z_q, z_fp\\)"):
        made().fit_batches([logits[0]])


def test_every_error_is_of_the_family(logits):
    for bad in ("text", 3, None, [["a"]], np.zeros((2, 2, 2)), np.zeros((4, 0)), np.zeros((3, 2)) * 1j):
        with pytest.raises(CATError):
            made().fit(bad, logits[1])
        with pytest.raises(CATError):
            made().fit(*logits).predict(bad)
