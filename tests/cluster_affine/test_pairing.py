"""Arrays to rows: dtypes, columns beyond the classes, the units of features."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.cluster_affine.pairing import pair
from cat_plugin.cluster_affine.validation import as_array
from cat_plugin.cluster_affine.workbench import Rows, Scaling


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
