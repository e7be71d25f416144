"""The bounded sample of a stream: which rows it keeps, in which order, and what it knows of the rest."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.sketch import RowSketch, _content_keys, row_limit


def rows_of(count, seed=0, classes=5):
    z_q, z_fp = np.random.default_rng(seed).normal(size=(2, count, classes))
    return Rows(z_q, z_fp, None, None, None)


def kept(sketch):
    return sorted(map(tuple, np.concatenate([sketch.rows().z_q, sketch.rows().z_fp], axis=1)))


def test_everything_that_fits_stays_in_order():
    rows, sketch = rows_of(40), RowSketch(40)
    assert sketch.empty
    for start in range(0, 40, 7):
        sketch.add(rows.take(np.arange(start, min(start + 7, 40))))
    assert not sketch.empty
    assert sketch.complete
    assert sketch.seen == 40
    np.testing.assert_array_equal(sketch.rows().z_q, rows.z_q)
    np.testing.assert_array_equal(sketch.rows().z_fp, rows.z_fp)


@pytest.mark.parametrize("limit", [1, 10, 39])
@pytest.mark.parametrize("batch", [1, 9, 400])
def test_the_rows_with_the_smallest_keys_are_kept(limit, batch):
    rows = rows_of(400)
    keys = _content_keys(rows)
    expected = rows.take(np.argsort(keys)[:limit])
    for order in (np.arange(400), np.random.default_rng(1).permutation(400)):
        sketch = RowSketch(limit)
        for start in range(0, 400, batch):
            sketch.add(rows.take(order[start : start + batch]))
        assert sketch.seen == 400
        assert not sketch.complete
        assert len(sketch.rows()) == limit
        np.testing.assert_array_equal(sketch.rows().z_q, expected.z_q)


def test_parts_that_are_merged_are_the_whole():
    rows = rows_of(300)
    whole, left, right = (RowSketch(50) for _ in range(3))
    whole.add(rows)
    left.add(rows.take(np.arange(120)))
    right.add(rows.take(np.arange(120, 300)))
    again = RowSketch.of(left.rows(), 50, left.seen)
    again.merge(right)
    assert again.seen == 300
    assert kept(again) == kept(whole)


def test_rows_that_are_equal_stay_in_the_order_of_their_coming():
    rows = rows_of(30).take(np.zeros(30, dtype=int))
    marked = Rows(rows.z_q, rows.z_fp, np.arange(30.0)[:, None], None, None)
    sketch = RowSketch(10)
    sketch.add(marked)
    np.testing.assert_array_equal(sketch.rows().features[:, 0], np.arange(10.0))


def test_keys_depend_on_every_column_and_on_nothing_else():
    rows = rows_of(1, classes=4)
    keys = {int(_content_keys(rows)[0])}
    for which in (rows.z_q, rows.z_fp):
        for column in range(4):
            which[0, column] += 1.0
            keys.add(int(_content_keys(rows)[0]))
    assert len(keys) == 9
    zeros = Rows(np.array([[0.0, 1.0], [-0.0, 1.0]]), np.zeros((2, 2)), None, None, None)
    assert len(set(_content_keys(zeros).tolist())) == 1
    single = Rows(*(np.full((1, 2), 1e-30, dtype=np.float32) for _ in range(2)), None, None, None)
    other = Rows(single.z_q * 2, single.z_fp, None, None, None)
    assert _content_keys(single)[0] != _content_keys(other)[0]


def test_limits_lie_between_two_and_sixteen_thousand():
    assert row_limit(0) == row_limit(1) == 16384
    assert row_limit(3000) == (48 << 20) // (8 * 3000) == 2097
    assert row_limit(10**6) == 2048
