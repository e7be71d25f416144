"""Time the fused cluster-affine step on this CPU beside the same step in PyTorch, and print a table.

Run from the checkout; the libraries are kept, so that a second run measures only::

    python -m benchmarks.cluster_affine --libraries DIR --out docs/benchmarks/cluster_affine.json

Each side runs in a process of its own, in which the other cannot empty the caches or hold threads.  The floor is the
time that the step's multiply-adds take at the rate that their instruction reaches with all operands in registers,
measured in the same process; what memory has to deliver comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from tvm_backend.kernels.cluster_affine.reference import reference
from tvm_backend.kernels.cluster_affine.spec import OPS, ClusterAffineSpec

CASES = {
    "diagonal, d 50": ClusterAffineSpec(OPS[0], 1000, 64, 50),
    "diagonal, d 0": ClusterAffineSpec(OPS[0], 1000, 64, 0),
    "diagonal, C 10, d 0": ClusterAffineSpec(OPS[0], 10, 64, 0),
    "lowrank 16, d 50": ClusterAffineSpec(OPS[1], 1000, 64, 50, rank=16),
    "full, C 10, 64 features": ClusterAffineSpec(OPS[2], 10, 8, 0, n_features=64),
}
SIDES = ("fused", "torch")


def arrays_for(spec: ClusterAffineSpec, rows: int) -> list[np.ndarray]:
    """Random inputs and an output filled with NaN."""
    rng = np.random.default_rng(rows)
    shapes = [
        tuple(rows if extent is None else extent for extent in shape) for _, shape, _ in spec.arguments()
    ]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes[:-1]]
    return [*inputs, np.full(shapes[-1], np.nan, np.float32)]


def multiply_adds(spec: ClusterAffineSpec) -> int:
    """Multiply-adds of one row; subtractions and comparisons go beside them in units of their own."""
    count = spec.n_components * spec.width + spec.n_clusters * spec.distance_width
    if spec.op == OPS[2]:
        return count + spec.n_classes * (spec.width + 1)
    return count + 2 * spec.n_classes + spec.rank * (spec.core_height + spec.n_classes)


def timed(function: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Median and 90th percentile in microseconds."""
    taken: list[float] = []
    for _ in range(20):
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 20:
        start = time.perf_counter()
        function()
        taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(taken), float(np.percentile(taken, 90))


def target() -> Any:
    """This processor."""
    import tvm
    from tvm.target import codegen

    return tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})


def compile_all(folder: Path) -> None:
    """Write one library with every case, and the loop that measures the peak, unless it is there."""
    import tvm

    from tvm_backend.kernels.cluster_affine.kernel import lower

    library = folder / "cases.so"
    if library.exists():
        return
    functions = {
        f"case{i}": lower(spec, target()).with_attr("global_symbol", f"case{i}")
        for i, spec in enumerate(CASES.values())
    }
    functions["peak"] = _peak()
    tvm.compile(tvm.IRModule(functions), target=target()).export_library(str(library))


_ROUNDS, _SUMS = 20_000, 12


def _peak() -> Any:
    """A function of multiply-adds on registers."""
    from tvm_backend.kernels import tir
    from tvm_backend.kernels.cluster_affine.cpu import CpuShape
    from tvm_backend.kernels.cpu import ir

    lanes = CpuShape.for_target(target()).lanes
    with tir.Function("peak") as function:
        data, output = function.buffers(
            [("data", (lanes,), "float32"), ("output", (_SUMS * lanes,), "float32")]
        )
        sums, factor = ir.Registers(_SUMS, "float32", lanes), ir.Registers(1, "float32", lanes)
        factor[0] = tir.load(data, [0], lanes)
        for i in range(_SUMS):
            sums[i] = tir.constant(float(i), "float32", lanes)
        with tir.loop(_ROUNDS):
            for i in range(_SUMS):
                sums[i] = ir.fma(sums[i], factor[0], factor[0], lanes)
        for i in range(_SUMS):
            tir.store(output, sums[i], [i * lanes], lanes)
    return function.result


def measure_fused(folder: Path, sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """Times and errors of the compiled functions, with the floor of each."""
    import tvm

    from tvm_backend.kernels.cluster_affine.cpu import CpuShape

    library = tvm.runtime.load_module(str(folder / "cases.so"))
    lanes = CpuShape.for_target(target()).lanes
    registers = [tvm.runtime.tensor(np.zeros(n, np.float32)) for n in (lanes, _SUMS * lanes)]
    peak = library.time_evaluator("peak", tvm.cpu(), number=3, repeat=30)(*registers).min
    each = peak * 1e6 / (_ROUNDS * _SUMS * lanes)
    found = []
    for i, (name, spec) in enumerate(CASES.items()):
        kernel = library[f"case{i}"]
        for rows in sizes:
            arrays = arrays_for(spec, rows)
            tensors = [tvm.runtime.tensor(array) for array in arrays]
            (expected,) = reference(spec, *arrays[:-1])
            median, late = timed(lambda k=kernel, t=tensors: k(*t), seconds)
            error = float(np.abs(tensors[-1].numpy() - expected).max() / np.abs(expected).max())
            floor = multiply_adds(spec) * rows * each / int(os.environ["TVM_NUM_THREADS"])
            row = {"case": name, "N": rows, "fused_us": median, "fused_p90": late, "error": error}
            found.append(row | {"floor_us": floor})
    return found


def measure_torch(sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """Times of the eager operators."""
    import torch

    import cat_plugin.graph.op  # noqa: F401

    found = []
    for name, spec in CASES.items():
        operator = getattr(torch.ops.cat, spec.op.removeprefix("cat::"))
        for rows in sizes:
            tensors: list[torch.Tensor | None] = [torch.from_numpy(a) for a in arrays_for(spec, rows)[:-1]]
            if spec.op == OPS[2] and not spec.n_features:
                tensors.insert(1, None)
            with torch.inference_mode():
                median, late = timed(lambda f=operator, t=tensors, a=spec.alpha: f(*t, a), seconds)
            found.append({"case": name, "N": rows, "torch_us": median, "torch_p90": late})
    return found


def side_by_side(folder: Path, threads: int, arguments: list[str]) -> list[dict[str, Any]]:
    """Both sides, one after the other, each in a process of its own."""
    number = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": number, "TVM_NUM_THREADS": number}
    environment |= {"OMP_WAIT_POLICY": "passive"}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.cluster_affine", "--side", side]
        command += ["--libraries", str(folder), *arguments]
        result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        for row in json.loads(result.stdout):
            rows.setdefault((row["case"], row["N"]), {"threads": threads}).update(row)
    for row in rows.values():
        row["times_as_fast"] = row["torch_us"] / row["fused_us"]
        row["of_peak"] = f"{row['floor_us'] / row['fused_us']:.0%}"
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    """Measure all cases and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each row and side of the table")
    parser.add_argument("--libraries", type=Path, help="where compiled functions are kept")
    parser.add_argument("--prepare", action="store_true", help="compile only")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        given = (options.rows, options.seconds)
        rows = measure_fused(options.libraries, *given) if options.side == "fused" else measure_torch(*given)
        print(json.dumps(rows))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.libraries or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        compile_all(folder)
        if options.prepare:
            return
        arguments = ["--rows", *map(str, options.rows), "--seconds", str(options.seconds)]
        rows = [row for threads in options.threads for row in side_by_side(folder, threads, arguments)]
    print(f"{'case':<24}{'threads':>8}{'N':>6}{'fused us':>10}{'PyTorch us':>12}{'ratio':>7}{'of peak':>9}")
    for row in rows:
        print(
            f"{row['case']:<24}{row['threads']:>8}{row['N']:>6}{row['fused_us']:>10.1f}{row['torch_us']:>12.1f}"
            f"{row['times_as_fast']:>7.1f}{row['of_peak']:>9}"
        )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
