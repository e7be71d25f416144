"""Arrays to rows: dtypes, columns beyond the classes, the units of features."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.cluster_affine.pairing import pair
from cat_plugin.cluster_affine.rows import Rows, Scaling
from cat_plugin.cluster_affine.validation import as_array
from cat_plugin.errors import CATValueError


def paired(z_q, z_fp, features=None):
    return pair(ClusterAffine(random_state=0), z_q, z_fp, features)[0]


def test_single_precision_stays_and_everything_else_becomes_double(logits):
    z_q, z_fp = logits
    assert paired(z_q.astype(np.float32), z_fp.astype(np.float32)).z_fp.dtype == np.float32
    assert paired(z_q, z_fp.astype(np.float16)).z_fp.dtype != np.float16
    assert paired(z_q, np.round(z_fp).astype(np.int64)).z_fp.dtype == np.float64


def test_columns_beyond_the_classes_come_before_the_features(logits):
    z_q, z_fp = logits
    further = np.arange(2.0 * len(z_q)).reshape(-1, 2)
    rows = paired(z_q, z_fp[:, :1], further)
    np.testing.assert_array_equal(rows.z_q, z_q[:, :1])
    np.testing.assert_array_equal(rows.features, np.column_stack([z_q[:, 1:], further]))


def test_arrays_of_bfloat16_are_widened():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    values = np.array([[1.0, -2.5], [0.125, 3.0]])
    widened = as_array(values.astype(bfloat16))
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, values)


def test_features_are_counted_in_the_units_of_the_logits():
    generator = np.random.default_rng(0)
    logits, features = generator.normal(size=(4000, 3)), generator.normal(size=(4000, 2))
    scaling = Scaling.of(Rows(5.0 * logits + 7.0, logits, 40.0 * features - 3.0))
    np.testing.assert_allclose(scaling.scale, [1, 1, 1, 8, 8], rtol=0.05)
    np.testing.assert_allclose(scaling.mean, [7, 7, 7, -3, -3], atol=2.0)


def test_what_is_corrected_has_the_columns_of_the_fit(logits):
    fitted = ClusterAffine(mode="diagonal", n_clusters=2, random_state=0).fit(*logits)
    with pytest.raises(CATValueError, match=r"7 features.*6 features"):
        fitted.predict(np.zeros((3, 7)))
    assert fitted.n_features_in_ == 6


def test_integer_logits_are_corrected_as_floats(logits):
    fitted = ClusterAffine(mode="diagonal", n_clusters=2, random_state=0).fit(*logits)
    rounded = np.round(logits[0])
    corrected = fitted.predict(rounded.astype(np.int32))
    assert corrected.dtype == np.float64
    np.testing.assert_array_equal(corrected, fitted.predict(rounded))


def test_tags_say_which_dtypes_are_kept(logits):
    kept = ClusterAffine().__sklearn_tags__().transformer_tags.preserves_dtype
    assert kept == ["float64", "float32"]
    fitted = ClusterAffine(mode="diagonal", n_clusters=2, random_state=0).fit(*logits)
    assert [fitted.transform(logits[0].astype(name)).dtype.name for name in kept] == kept
