"""Two processes that see disjoint parts give the fit of one process that sees everything."""

from __future__ import annotations

import numpy as np
import pytest
from torch import distributed as dist
from torch import multiprocessing

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.distributed import fit
from cat_plugin.errors import CATError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

CASES = {
    "paper": ({"mode": "paper", "n_clusters": 5, "random_state": 0}, None),
    "auto": ({"n_clusters": 8, "random_state": 0}, None),
    "auto_streamed": ({"n_clusters": 8, "random_state": 0}, 200),
    "diagonal_streamed": ({"mode": "diagonal", "n_clusters": 5, "random_state": 1}, 150),
    "lowrank_streamed": ({"mode": "lowrank", "n_clusters": 4, "n_components": 3, "random_state": 1}, 150),
    "full_streamed": ({"mode": "full", "n_clusters": 4, "random_state": 1}, 150),
}
OFFSET = {"mode": "diagonal", "n_clusters": 4, "random_state": 0}


def made(rows=700):
    rng = np.random.default_rng(0)
    z_fp = rng.normal(size=(rows, 6)) * 4
    z_q = np.tanh(z_fp @ (np.eye(6) + 0.2 * rng.normal(size=(6, 6))) / 4) * 3 + 0.3 * rng.normal(
        size=(rows, 6)
    )
    return z_q, z_fp, rng.normal(size=(rows, 3))


def cut(arrays, start, stop, size=64):
    return [tuple(a[i : min(i + size, stop)] for a in arrays) for i in range(start, stop, size)]


def worker(rank, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    z_q, z_fp, features = made()
    mine = (0, 300) if rank == 0 else (300, 700)
    for name, (settings, limit) in CASES.items():
        fitted = fit(ClusterAffine(**settings), cut((z_q, z_fp), *mine), sketch_rows=limit)
        np.savez(f"{directory}/{name}{rank}.npz", **fitted.parameters_.to_arrays(), z=fitted.predict(z_q))
    # An offset that would cost twelve digits of a sum of squares.
    fitted = fit(ClusterAffine(**OFFSET), cut((z_q + 1e6, z_fp + 1e6), *mine), sketch_rows=200)
    np.savez(f"{directory}/offset{rank}.npz", z=fitted.predict(z_q + 1e6))
    settings = {"mode": "full", "n_clusters": 3, "random_state": 0}
    fitted = fit(ClusterAffine(**settings), cut((z_q, z_fp, features), *mine), sketch_rows=200)
    np.savez(f"{directory}/features{rank}.npz", z=fitted.predict(z_q, features))
    # One process has nothing to give.
    empty = [] if rank == 1 else cut((z_q, z_fp), 0, 700)
    fitted = fit(ClusterAffine(mode="diagonal", n_clusters=4, random_state=0), empty, sketch_rows=200)
    np.savez(f"{directory}/empty{rank}.npz", z=fitted.predict(z_q))
    # Without a seed, both take the same one.
    fitted = fit(ClusterAffine(mode="diagonal", n_clusters=6), cut((z_q, z_fp), *mine))
    assert fitted.random_state is None
    np.savez(f"{directory}/seedless{rank}.npz", z=fitted.predict(z_q))
    # A bad row on one process is an error on both, and neither waits for the other.
    spoilt = z_q.copy()
    spoilt[310, 2] = np.nan
    try:
        fit(ClusterAffine(random_state=0), cut((spoilt, z_fp), *mine))
    except CATError as error:
        with open(f"{directory}/error{rank}.txt", "w", encoding="utf-8") as stream:
            stream.write(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(worker, args=(str(directory),), nprocs=2, join=True)
    return directory


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_one_process(results, name):
    z_q, z_fp, _ = made()
    settings, limit = CASES[name]
    single = ClusterAffine(**settings).fit_batches(cut((z_q, z_fp), 0, 700), sketch_rows=limit)
    expected = single.predict(z_q)
    for rank in range(2):
        got = np.load(results / f"{name}{rank}.npz")
        np.testing.assert_allclose(got["z"], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got["centroids"], single.parameters_.centroids, rtol=1e-9)
        for key in ("gamma", "weight", "core"):
            if key in got:
                np.testing.assert_allclose(
                    got[key], single.parameters_.to_arrays()[key], rtol=1e-9, atol=1e-9
                )
    if limit is None:
        in_memory = ClusterAffine(**settings).fit(z_q, z_fp).predict(z_q)
        np.testing.assert_allclose(in_memory, expected, rtol=1e-9)


def test_common_offset(results):
    z_q, z_fp, _ = made()
    moved = cut((z_q + 1e6, z_fp + 1e6), 0, 700)
    expected = ClusterAffine(**OFFSET).fit_batches(moved, sketch_rows=200).predict(z_q + 1e6)
    for rank in range(2):
        # The spacing of float64 at a million is 1e-10.
        got = np.load(results / f"offset{rank}.npz")["z"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8)


def test_features(results):
    z_q, z_fp, features = made()
    single = ClusterAffine(mode="full", n_clusters=3, random_state=0).fit_batches(
        cut((z_q, z_fp, features), 0, 700), sketch_rows=200
    )
    for rank in range(2):
        np.testing.assert_allclose(
            np.load(results / f"features{rank}.npz")["z"], single.predict(z_q, features), rtol=1e-9
        )


def test_process_without_rows(results):
    z_q, z_fp, _ = made()
    single = ClusterAffine(mode="diagonal", n_clusters=4, random_state=0).fit_batches(
        cut((z_q, z_fp), 0, 700), sketch_rows=200
    )
    for rank in range(2):
        np.testing.assert_allclose(np.load(results / f"empty{rank}.npz")["z"], single.predict(z_q), rtol=1e-9)


def test_processes_agree_without_a_seed(results):
    first, second = (np.load(results / f"seedless{rank}.npz")["z"] for rank in range(2))
    np.testing.assert_array_equal(first, second)


def test_error_on_one_process_ends_both(results):
    assert "1 other process" in (results / "error0.txt").read_text()
    assert "row 10, column 2" in (results / "error1.txt").read_text()


def test_group_must_be_initialised():
    with pytest.raises(CATError, match="init_process_group"):
        fit(ClusterAffine(), [])
