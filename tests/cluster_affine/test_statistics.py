"""Statistics against sums over rows."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_plugin.cluster_affine.statistics import StatisticsAccumulator

FIELDS = ("count", "mean_q", "mean_fp", "qq", "qf", "ff", "mean_x", "xx", "xq", "xf")


def rows_of(seed, rows=60, classes=3, clusters=4, width=2, offset=0.0):
    rng = np.random.default_rng(seed)
    q, f = rng.normal(size=(2, rows, classes)) + offset
    return q, f, rng.integers(0, clusters, size=rows), rng.normal(size=(rows, width)) + offset


def collect(*parts, clusters=4):
    """The statistics of one or several batches."""
    accumulator = StatisticsAccumulator(clusters, parts[0][0].shape[1], parts[0][3].shape[1])
    for part in parts:
        accumulator.add(*part)
    return accumulator.result()


def assert_equal(a, b, rtol=1e-10, atol=1e-10):
    for name in FIELDS:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=atol, err_msg=name)


def test_against_rows():
    q, f, label, x = rows_of(0)
    got = collect((q, f, label, x), clusters=5)  # the fifth has no rows
    for k in range(5):
        members = label == k
        assert got.count[k] == members.sum()
        if not members.any():
            assert not got.xx[k].any()
            continue
        covariance = np.cov(np.concatenate([q[members], f[members], x[members]], axis=1).T, bias=True)
        covariance = covariance * members.sum()
        np.testing.assert_allclose(got.mean_q[k], q[members].mean(axis=0))
        np.testing.assert_allclose(got.mean_fp[k], f[members].mean(axis=0))
        np.testing.assert_allclose(got.qq[k], np.diag(covariance)[:3])
        np.testing.assert_allclose(got.ff[k], np.diag(covariance)[3:6])
        np.testing.assert_allclose(got.qf[k], np.diag(covariance[:3, 3:6]), atol=1e-12)
        np.testing.assert_allclose(got.xx[k], covariance[6:, 6:], atol=1e-12)
        np.testing.assert_allclose(got.xq[k], covariance[6:, :3], atol=1e-12)
        np.testing.assert_allclose(got.xf[k], covariance[6:, 3:6], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 59), max_size=5), st.permutations(range(6)), st.sampled_from([0.0, 1e3]))
def test_any_split_in_any_order_gives_the_same(cuts, order, offset):
    q, f, label, x = rows_of(1, offset=offset)
    bounds = [0, *sorted(cuts), 60]
    parts = [(q[a:b], f[a:b], label[a:b], x[a:b]) for a, b in pairwise(bounds)]
    shuffled = [parts[i] for i in order if i < len(parts)]
    assert_equal(collect(*shuffled), collect((q, f, label, x)), atol=1e-9)


def test_a_common_offset_costs_no_digits():
    # A sum of squares at 1e6 would leave four digits of the variance.
    q, f, label, x = rows_of(2, rows=400)
    # Whole numbers of 2**-20 survive the addition of the offset unchanged.
    q, f, x = (np.round(a * 2**20) / 2**20 for a in (q, f, x))
    plain = collect((q, f, label, x))
    moved = [a + 1e6 for a in (q, f, x)]
    merged = collect(
        *((moved[0][s], moved[1][s], label[s], moved[2][s]) for s in np.array_split(np.arange(400), 7))
    )
    for name in ("qq", "qf", "ff", "xx", "xq", "xf"):
        np.testing.assert_allclose(getattr(merged, name), getattr(plain, name), rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(merged.mean_q - 1e6, plain.mean_q, rtol=0, atol=1e-9)


def test_reduced_is_the_sum_of_the_parties():
    batches = [rows_of(seed, offset=1e4) for seed in range(3)]
    parts = [collect(batch) for batch in batches]
    # Three parties in lockstep: collect what each hands in, then answer all with the sum.
    barrier = threading.Barrier(3)
    handed = [None] * 3

    def total_of(rank):
        def total(array):
            handed[rank] = np.array(array)
            barrier.wait()
            summed = handed[0] + handed[1] + handed[2]
            barrier.wait()
            return summed

        return total

    results = [None] * 3

    def run(rank):
        results[rank] = parts[rank].reduced(total_of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_equal(result, collect(*batches), rtol=1e-9, atol=1e-8)
