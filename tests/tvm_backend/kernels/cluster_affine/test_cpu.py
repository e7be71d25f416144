"""The fused cluster-affine function against its float64 reference, on this CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from cat_plugin.errors import CompileError
from tvm_backend import compat
from tvm_backend.kernels.cluster_affine.cpu import CpuShape, build
from tvm_backend.kernels.cluster_affine.kernel import (
    OPS,
    ClusterAffineSpec,
    lower,
    prim_func,
    reference,
    schedule,
)

DIAGONAL, LOWRANK, FULL = OPS
SHAPES = [(16, 8, 2), (8, 4, 2), (4, 3, 5)]


def _numpy(dtype: str) -> str:
    """numpy has no bfloat16: such tests convert on their own."""
    return "float32" if dtype == "bfloat16" else dtype


def arrays_for(spec: ClusterAffineSpec, rows: int, seed: int = 0) -> list[np.ndarray]:
    """Random inputs, and results filled with NaN so that an unwritten place shows."""
    rng = np.random.default_rng(seed)
    count = 2 if spec.finish == "topk" else 1
    arguments = spec.arguments()
    result = []
    for place, (_, shape, dtype) in enumerate(arguments):
        extents = tuple(rows if extent is None else extent for extent in shape)
        if place >= len(arguments) - count:
            result.append(
                np.full(extents, -7) if dtype == "int64" else np.full(extents, np.nan, _numpy(dtype))
            )
        else:
            result.append(rng.standard_normal(extents).astype(_numpy(dtype)))
    return result


def compiled(function: Any, target: Any) -> Any:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target)["main"]


def native() -> Any:
    from tvm.target import codegen

    return tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})


def call(kernel: Any, arrays: list[np.ndarray], results: int = 1) -> list[np.ndarray]:
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    kernel(*tensors)
    return [tensor.numpy() for tensor in tensors[-results:]]


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("components", [0, 10, 50])
@pytest.mark.parametrize("classes", [10, 1000])
def test_diagonal_dynamic_batch(classes: int, components: int) -> None:
    spec = ClusterAffineSpec(DIAGONAL, classes, 64, min(components, classes))
    kernel = compiled(lower(spec, native()), native())
    for rows in (1, 2, 7, 67, 256):
        arrays = arrays_for(spec, rows, seed=rows)
        (expected,) = reference(spec, *arrays[:-1])
        (got,) = call(kernel, arrays)
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("batch", [1, 3, 8, 21])
def test_static_batch(batch: int) -> None:
    spec = ClusterAffineSpec(DIAGONAL, 37, 9, 5, batch=batch)
    arrays = arrays_for(spec, batch)
    (expected,) = reference(spec, *arrays[:-1])
    (got,) = call(compiled(lower(spec, native()), native()), arrays)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "spec",
    [
        ClusterAffineSpec(LOWRANK, 21, 6, 10, rank=8),
        ClusterAffineSpec(LOWRANK, 130, 3, 7, rank=5, n_distance_components=3),
        ClusterAffineSpec(LOWRANK, 33, 4, 0, rank=19),
        ClusterAffineSpec(FULL, 21, 6, 0),
        ClusterAffineSpec(FULL, 10, 5, 4, n_features=13),
        ClusterAffineSpec(FULL, 10, 5, 0, n_features=64),
        ClusterAffineSpec(DIAGONAL, 1, 1, 1),
        ClusterAffineSpec(DIAGONAL, 40, 17, 6, finish="softmax"),
        ClusterAffineSpec(DIAGONAL, 40, 17, 6, finish="topk", top_k=3),
        ClusterAffineSpec(LOWRANK, 300, 3, 7, rank=2, finish="topk", top_k=5),
        ClusterAffineSpec(FULL, 12, 4, 0, finish="softmax"),
    ],
    ids=lambda spec: f"{spec.op.split('_')[-1]}-{spec.width}-{spec.n_components}-{spec.finish}",
)
def test_modes_and_register_blocks(spec: ClusterAffineSpec, shape: tuple[int, int, int]) -> None:
    kernel = compiled(build(spec, CpuShape(*shape)), native())
    results = 2 if spec.finish == "topk" else 1
    for rows in (1, 5, 19):
        arrays = arrays_for(spec, rows, seed=rows)
        expected = reference(spec, *arrays[:-results])
        got = call(kernel, arrays, results)
        assert relative(got[0], expected[0]) < 1e-5
        if results == 2:
            np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("components", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_go_to_the_lower_index(shape: tuple[int, int, int], components: int) -> None:
    """Equal and mirrored centroids, at every pair of places: within a vector, across vectors, in the tail."""
    clusters, classes = 37, 3
    spec = ClusterAffineSpec(DIAGONAL, classes, clusters, components, alpha=1.0)
    kernel = compiled(build(spec, CpuShape(*shape)), native())
    rng = np.random.default_rng(0)
    logits = np.zeros((9, classes), np.float32)
    for _ in range(40):
        low, high = sorted(rng.choice(clusters, 2, replace=False))
        centroids = rng.uniform(5, 9, (clusters, classes)).astype(np.float32)
        centroids[low] = [1, -2, 0.5]
        centroids[high] = centroids[low] * rng.choice([-1, 1], classes)
        gamma = np.ones((clusters, classes), np.float32)
        beta = np.repeat(np.arange(clusters, dtype=np.float32)[:, None], classes, axis=1)
        arrays = [
            logits,
            np.zeros(classes, np.float32),
            np.eye(classes, dtype=np.float32)[:components],
            centroids,
            gamma,
            beta,
            np.full_like(logits, np.nan),
        ]
        (got,) = call(kernel, arrays)
        np.testing.assert_array_equal(got, np.full_like(logits, low))


def test_nan_and_infinite_rows_stay_in_bounds() -> None:
    spec = ClusterAffineSpec(DIAGONAL, 20, 5, 4)
    arrays = arrays_for(spec, 11)
    (clean,) = call(compiled(lower(spec, native()), native()), arrays)
    arrays[0][2] = np.nan
    arrays[0][5, 3] = np.inf
    (got,) = call(compiled(lower(spec, native()), native()), arrays)
    assert np.isnan(got[2]).all()
    kept = [row for row in range(11) if row not in (2, 5)]
    np.testing.assert_array_equal(got[kept], clean[kept])


def test_float16_logits() -> None:
    spec = ClusterAffineSpec(DIAGONAL, 100, 16, 10, dtype="float16")
    arrays = arrays_for(spec, 13)
    (expected,) = reference(spec, *arrays[:-1])
    (got,) = call(compiled(lower(spec, native()), native()), arrays)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_logits() -> None:
    """bfloat16 as torch holds it; the result equals the float32 one, rounded."""
    torch = pytest.importorskip("torch", reason="bfloat16 tensors come from torch")
    spec = ClusterAffineSpec(DIAGONAL, 100, 16, 10, dtype="bfloat16")
    arrays = arrays_for(spec, 13)
    logits = torch.from_numpy(arrays[0]).to(torch.bfloat16)
    (expected,) = reference(spec, logits.float().numpy(), *arrays[1:-1])
    got = torch.empty_like(logits)
    tensors = [tvm.runtime.tensor(array) for array in arrays[1:-1]]
    kernel = compiled(lower(spec, native()), native())
    kernel(tvm.runtime.from_dlpack(logits), *tensors, tvm.runtime.from_dlpack(got))
    np.testing.assert_allclose(got.float().numpy(), expected, rtol=2**-8, atol=1e-3)


def test_schedule_can_be_used_alone() -> None:
    module = schedule(native(), n_classes=10, n_clusters=4, n_components=2, alpha=0.25)
    spec = ClusterAffineSpec(DIAGONAL, 10, 4, 2, alpha=0.25)
    arrays = arrays_for(spec, 6)
    (expected,) = reference(spec, *arrays[:-1])
    (got,) = call(tvm.compile(module, target=native())["cluster_affine"], arrays)
    assert relative(got, expected) < 1e-5


def test_prim_func_in_a_relax_program() -> None:
    """Called from Relax with a symbolic batch, through the default pipeline."""
    from tvm import relax

    sizes = {"n_classes": 10, "n_clusters": 4, "n_components": 3}
    spec = ClusterAffineSpec(DIAGONAL, **sizes)
    arrays = arrays_for(spec, 5)
    builder = relax.BlockBuilder()
    batch = tvm.tirx.Var("n", "int64")
    logits = relax.Var("logits", compat.tensor_type((batch, 10), "float32"))
    with builder.function("main", [logits]):
        function = builder.add_func(prim_func(DIAGONAL, **sizes), "cluster_affine")
        constants = [relax.const(array) for array in arrays[1:-1]]
        with builder.dataflow():
            doubled = builder.emit(relax.op.add(logits, logits))
            result = builder.emit(
                relax.call_tir(function, [doubled, *constants], compat.tensor_type((batch, 10), "float32"))
            )
            final = builder.emit_output(relax.op.negative(result))
        builder.emit_func_output(final)
    target = native()
    executable = tvm.compile(
        builder.finalize(), target=target, relax_pipeline=relax.get_default_pipeline(target)
    )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(arrays[0])).numpy()
    (expected,) = reference(spec, arrays[0] * 2, *arrays[1:-1])
    assert relative(got, -expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"op": "cat::other"}, "cat::other"),
        ({"dtype": "int8"}, "int8"),
        ({"n_classes": 0}, "classes"),
        ({"rank": 3}, "rank"),
        ({"n_features": 3}, "features"),
        ({"alpha": float("nan")}, "alpha"),
        ({"n_distance_components": 9}, "components"),
        ({"batch": 0}, "batch"),
        ({"finish": "topk", "top_k": 11}, "11"),
    ],
)
def test_sizes_that_do_not_go_together(change: dict[str, Any], word: str) -> None:
    sizes: dict[str, Any] = {"op": DIAGONAL, "n_classes": 10, "n_clusters": 4, "n_components": 2}
    with pytest.raises(CompileError, match=word):
        prim_func(**(sizes | change))


def test_reference_by_hand() -> None:
    """One row, two clusters: the second is nearer; z = 1, gamma = 3, beta = 4, alpha = 0.5."""
    spec = ClusterAffineSpec(DIAGONAL, 1, 2, 1, alpha=0.5)
    column = np.array([[0.0], [2.0]])
    (got,) = reference(
        spec,
        np.array([[1.0]]),
        np.array([-0.5]),
        np.array([[1.0]]),
        column,
        np.array([[9.0], [3.0]]),
        column * 2,
    )
    assert got[0, 0] == 1 + 0.5 * (3 * 1 + 4 - 1)
