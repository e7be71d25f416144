"""The CUDA kernels of the cluster-affine step, on an emulated device and as machine code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm

from cat_plugin.errors import CompileError
from tests.tvm_backend import cuda_tools
from tvm_backend import cuda_build
from tvm_backend.kernels.cluster_affine.cuda.kernel import FEW_ROWS, fits_tile
from tvm_backend.kernels.cluster_affine.kernel import OPS, ClusterAffineSpec, lower, reference
from tvm_backend.kernels.cluster_affine.spec import RESULTS, Finish

DIAGONAL, LOWRANK, FULL = OPS
emulated = pytest.mark.skipif(cuda_tools.available() is not None, reason=str(cuda_tools.available()))


def executable(spec: ClusterAffineSpec) -> object:
    function = lower(spec, cuda_tools.target()).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=cuda_tools.target())


def arrays_for(spec: ClusterAffineSpec, rows: int) -> list[np.ndarray]:
    """Random inputs, and results that are filled with what no kernel writes."""
    rng = np.random.default_rng(rows)
    arrays = []
    for name, extents, dtype in spec.arguments():
        shape = tuple(rows if extent is None else extent for extent in extents)
        blank = np.full(shape, -7 if dtype == "int64" else np.nan, dtype)
        arrays.append(blank if name in RESULTS else rng.standard_normal(shape).astype(dtype))
    return arrays


def given(spec: ClusterAffineSpec, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Those of the arrays that are not results."""
    named = zip(spec.arguments(), arrays, strict=True)
    return [array for (name, _, _), array in named if name not in RESULTS]


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


FEW, MANY = 5, FEW_ROWS + 9


CASES = {
    "diagonal, many": (ClusterAffineSpec(DIAGONAL, 1000, 64, 50), MANY),
    "diagonal, static": (ClusterAffineSpec(DIAGONAL, 1000, 64, 50, batch=FEW), FEW),
    "no projection, many": (ClusterAffineSpec(DIAGONAL, 10, 64, 0), MANY),
    "no projection, few": (ClusterAffineSpec(DIAGONAL, 10, 70, 0), FEW),
    "odd sizes": (ClusterAffineSpec(DIAGONAL, 129, 33, 7), MANY),
    "two tiles of components": (ClusterAffineSpec(DIAGONAL, 131, 5, 65, n_distance_components=9), MANY),
    "one of each": (ClusterAffineSpec(DIAGONAL, 1, 1, 1), MANY),
    "lowrank, few": (ClusterAffineSpec(LOWRANK, 200, 6, 10, rank=8), FEW),
    "lowrank, many": (ClusterAffineSpec(LOWRANK, 61, 6, 10, rank=33, n_distance_components=3), MANY),
    "lowrank of rows, many": (ClusterAffineSpec(LOWRANK, 24, 6, 0, rank=4), MANY),
    "lowrank of rows, few": (ClusterAffineSpec(LOWRANK, 24, 6, 0, rank=4), FEW),
    "full": (ClusterAffineSpec(FULL, 21, 6, 0), FEW),
    "full, projected features": (ClusterAffineSpec(FULL, 10, 5, 4, n_features=13), FEW),
    "full, features": (ClusterAffineSpec(FULL, 10, 5, 0, n_features=64), FEW),
    "half, few": (ClusterAffineSpec(DIAGONAL, 100, 16, 10, dtype="float16"), FEW),
    "narrow, a cluster for each warp": (ClusterAffineSpec(DIAGONAL, 10, 8, 0), MANY),
    "half, many": (ClusterAffineSpec(DIAGONAL, 100, 16, 10, dtype="float16"), MANY),
    "softmax, few": (ClusterAffineSpec(DIAGONAL, 1000, 64, 50, finish="softmax"), FEW),
    "softmax, many": (ClusterAffineSpec(DIAGONAL, 100, 16, 10, finish="softmax"), MANY),
    "softmax, one class": (ClusterAffineSpec(DIAGONAL, 1, 4, 0, finish="softmax"), FEW),
    "softmax, half, many": (ClusterAffineSpec(DIAGONAL, 61, 9, 0, dtype="float16", finish="softmax"), MANY),
    "softmax, lowrank, few": (ClusterAffineSpec(LOWRANK, 200, 6, 10, rank=9, finish="softmax"), FEW),
    "softmax, lowrank, many": (ClusterAffineSpec(LOWRANK, 45, 6, 10, rank=8, finish="softmax"), MANY),
    "softmax, full": (ClusterAffineSpec(FULL, 10, 5, 4, n_features=13, finish="softmax"), FEW),
    "largest, few": (ClusterAffineSpec(DIAGONAL, 1000, 64, 50, finish="topk"), FEW),
    "largest, many": (ClusterAffineSpec(DIAGONAL, 100, 16, 10, finish="topk", top_k=7), MANY),
    "largest, all of them": (ClusterAffineSpec(DIAGONAL, 45, 9, 0, finish="topk", top_k=45), MANY),
    "largest, half, few": (ClusterAffineSpec(DIAGONAL, 61, 9, 0, dtype="float16", finish="topk"), FEW),
    "largest, lowrank, few": (ClusterAffineSpec(LOWRANK, 24, 6, 0, rank=4, finish="topk", top_k=24), FEW),
    "largest, lowrank, many": (ClusterAffineSpec(LOWRANK, 45, 6, 10, rank=8, finish="topk"), MANY),
    "largest, full": (ClusterAffineSpec(FULL, 21, 6, 0, finish="topk"), FEW),
}


Results = dict[str, list[tuple[list[np.ndarray], tuple[np.ndarray, ...]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases in both orders of threads, in one process: (found, expected)."""
    folder = tmp_path_factory.mktemp("cuda")
    calls, cases = [], []
    for number, (name, (spec, rows)) in enumerate(CASES.items()):
        library = cuda_tools.export(executable(spec), folder / f"kernel{number}.so")
        arrays = arrays_for(spec, rows)
        expected = reference(spec, *given(spec, arrays))
        for reverse in (False, True):
            calls.append(cuda_tools.Call(library, arrays, reverse))
            cases.append((name, expected))
    found: Results = {}
    for (name, expected), arrays in zip(cases, cuda_tools.run(calls), strict=True):
        found.setdefault(name, []).append((arrays[-len(expected) :], expected))
    return found


@emulated
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, results: Results) -> None:
    """In both orders of threads and blocks: a missing barrier shows in one of them."""
    assert len(results[name]) == 2
    for found, expected in results[name]:
        for got, wanted in zip(found, expected, strict=True):
            if got.dtype == np.int64:
                np.testing.assert_array_equal(got, wanted)
            elif CASES[name][0].dtype == "float16":
                assert got.dtype == np.float16
                np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=1e-3, atol=1e-3)
            else:
                assert relative(got, wanted) < 1e-5


@emulated
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_equal_logits_are_ranked_by_class(rows: int, tmp_path: Path) -> None:
    """All values of rows with many equal ones come out in order, the lower class first."""
    classes = 75
    spec = ClusterAffineSpec(DIAGONAL, classes, 3, 0, alpha=0.25, finish="topk", top_k=classes)
    arrays = arrays_for(spec, rows)
    rng = np.random.default_rng(1)
    logits = rng.integers(-3, 3, (rows, classes)).astype(np.float32)
    logits[0] = 0
    arrays[0], arrays[3] = logits, np.zeros_like(arrays[3])
    arrays[4], arrays[5] = np.ones_like(arrays[4]), np.zeros_like(arrays[5])
    order = np.argsort(-logits, axis=1, kind="stable")
    library = cuda_tools.export(executable(spec), tmp_path / "kernel.so")
    for found in cuda_tools.run([cuda_tools.Call(library, arrays, reverse) for reverse in (False, True)]):
        np.testing.assert_array_equal(found[-1], order)
        np.testing.assert_array_equal(found[-2], np.take_along_axis(logits, order, axis=1))


@emulated
@pytest.mark.parametrize(("components", "rows"), [(0, FEW), (0, MANY), (3, FEW), (3, MANY)])
def test_ties_go_to_the_lower_index(components: int, rows: int, tmp_path: Path) -> None:
    clusters, classes = 70, 3
    spec = ClusterAffineSpec(DIAGONAL, classes, clusters, components, alpha=1.0)
    library = cuda_tools.export(executable(spec), tmp_path / "kernel.so")
    rng = np.random.default_rng(0)
    logits = np.zeros((rows, classes), np.float32)
    gamma = np.ones((clusters, classes), np.float32)
    beta = np.repeat(np.arange(clusters, dtype=np.float32)[:, None], classes, axis=1)
    places = [(0, 1), (3, 35), (31, 32), (40, 69), (5, 64)]
    calls = []
    for low, high in places:
        centroids = rng.uniform(5, 9, (clusters, classes)).astype(np.float32)
        centroids[low] = [1, -2, 0.5]
        centroids[high] = [-1, -2, -0.5]
        eye = np.eye(classes, dtype=np.float32)[:components]
        arrays = [
            logits,
            np.zeros(classes, np.float32),
            eye,
            centroids,
            gamma,
            beta,
            np.full_like(logits, np.nan),
        ]
        calls.append(cuda_tools.Call(library, arrays))
    for (low, _), got in zip(places, cuda_tools.run(calls), strict=True):
        np.testing.assert_array_equal(got[-1], np.full_like(logits, low))


def _without_barrier(number: int) -> Callable[[str, str], tuple[str, bytes]]:
    """A compiler that drops one barrier of the source."""

    def compile_source(source: str, arch: str) -> tuple[str, bytes]:
        places = [match.start() for match in re.finditer(r"__syncthreads\(\);", source)]
        start = places[number]
        return cuda_tools.emulate(source[:start] + source[start + len("__syncthreads();") :], arch)

    return compile_source


@emulated
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_emulator_finds_a_missing_barrier(number: int, tmp_path: Path) -> None:
    """The kernel for few rows with one barrier removed gives wrong results in some order."""
    spec = ClusterAffineSpec(DIAGONAL, 300, 40, 20, batch=3)
    arrays = arrays_for(spec, 3)
    path = tmp_path / "kernel.so"
    packer = cuda_build.pack_imports("sm_90", _without_barrier(number))
    executable(spec).export_library(str(path), fpack_imports=packer)  # type: ignore[attr-defined]
    (expected,) = reference(spec, *given(spec, arrays))
    results = cuda_tools.run([cuda_tools.Call(path, arrays, reverse) for reverse in (False, True)])
    assert not all(np.allclose(got[-1], expected, rtol=1e-4, atol=1e-4) for got in results)


def test_what_does_not_fit_into_shared_memory() -> None:
    with pytest.raises(CompileError, match="shared memory"):
        lower(ClusterAffineSpec(DIAGONAL, 20000, 4, 0), cuda_tools.target())
    with pytest.raises(CompileError, match="shared memory"):
        lower(ClusterAffineSpec(DIAGONAL, 7000, 4, 0, finish="softmax"), cuda_tools.target())


def test_large_projections_go_row_by_row() -> None:
    assert fits_tile(ClusterAffineSpec(DIAGONAL, 1000, 64, 50))
    assert not fits_tile(ClusterAffineSpec(DIAGONAL, 1000, 64, 500))
    assert not fits_tile(ClusterAffineSpec(FULL, 1000, 64, 50))


@pytest.mark.parametrize("finish", ["logits", "softmax", "topk"])
def test_bfloat16_compiles(finish: Finish) -> None:
    """numpy has no bfloat16 to run it with; nvcc takes the source."""
    try:
        cuda_build.find_nvcc()
    except CompileError:
        pytest.skip("nvcc is not installed")
    spec = ClusterAffineSpec(DIAGONAL, 1000, 64, 50, dtype="bfloat16", finish=finish)
    (source,) = cuda_build.sources(executable(spec))
    found = cuda_build.resources(source, "sm_90")
    assert len(found) == 2
    assert all(kernel["spill_loads"] == 0 for kernel in found.values())


@pytest.mark.parametrize(("classes", "clusters", "components"), [(10, 8, 0), (10, 64, 8), (10, 8, 20)])
def test_a_sum_for_each_warp_of_a_narrow_row_compiles(classes: int, clusters: int, components: int) -> None:
    import tvm

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    function = lower(ClusterAffineSpec(OPS[0], classes, clusters, components), target)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    assert "__global__" in cuda_build.sources(tvm.compile(module, target=target))[0]
