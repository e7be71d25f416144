"""Time the fused cluster-affine step on this CPU beside the same step in PyTorch, and print a table.

Run from the checkout, with the number of threads set from outside for everybody alike::

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 TVM_NUM_THREADS=1 python -m benchmarks.cluster_affine --out results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

import cat_plugin.graph.op  # noqa: F401
from tvm_backend.kernels.cluster_affine import OPS, ClusterAffineSpec, lower, reference

CASES = {
    "diagonal, d 50": ClusterAffineSpec(OPS[0], 1000, 64, 50),
    "diagonal, d 0": ClusterAffineSpec(OPS[0], 1000, 64, 0),
    "diagonal, C 10, d 0": ClusterAffineSpec(OPS[0], 10, 64, 0),
    "lowrank 16, d 50": ClusterAffineSpec(OPS[1], 1000, 64, 50, rank=16),
    "full, C 10, 64 features": ClusterAffineSpec(OPS[2], 10, 8, 0, n_features=64),
}


def arrays_for(spec: ClusterAffineSpec, rows: int) -> list[np.ndarray]:
    """Random inputs and an output filled with NaN."""
    rng = np.random.default_rng(rows)
    shapes = [
        tuple(rows if extent is None else extent for extent in shape) for _, shape, _ in spec.arguments()
    ]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes[:-1]]
    return [*inputs, np.full(shapes[-1], np.nan, np.float32)]


def torch_step(spec: ClusterAffineSpec, arrays: list[np.ndarray]) -> Callable[[], torch.Tensor]:
    """The same step by the eager operator."""
    operator = getattr(torch.ops.cat, spec.op.removeprefix("cat::"))
    tensors: list[torch.Tensor | None] = [torch.from_numpy(array) for array in arrays[:-1]]
    if spec.op == OPS[2] and not spec.n_features:
        tensors.insert(1, None)
    return lambda: operator(*tensors, spec.alpha)


def medians(functions: list[Callable[[], Any]], seconds: float) -> list[tuple[float, float]]:
    """Median and 90th percentile in microseconds of each function, in alternation so that all see the same machine."""
    samples: list[list[float]] = [[] for _ in functions]
    for function in functions:
        for _ in range(3):
            function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 20:
        for function, taken in zip(functions, samples, strict=True):
            for _ in range(5):
                start = time.perf_counter()
                function()
                taken.append((time.perf_counter() - start) * 1e6)
    return [(statistics.median(taken), float(np.percentile(taken, 90))) for taken in samples]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "tvm": tvm.__version__,
        "torch_threads": torch.get_num_threads(),
        "tvm_threads": os.environ.get("TVM_NUM_THREADS", "default"),
    }


def main() -> None:
    """Measure all cases and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row of the table")
    parser.add_argument("--mcpu", help="compile for this processor, not for the one at hand")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    from tvm.target import codegen

    target = tvm.target.Target({"kind": "llvm", "mcpu": options.mcpu or codegen.llvm_get_system_cpu()})
    results = []
    print(
        f"{'case':<24} {'N':>5} {'fused us':>9} {'p90':>8} {'torch us':>9} {'p90':>8} {'ratio':>6} {'error':>8}"
    )
    for name, spec in CASES.items():
        function = lower(spec, target).with_attr("global_symbol", "main")
        kernel = tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]
        for rows in options.rows:
            arrays = arrays_for(spec, rows)
            tensors = [tvm.runtime.tensor(array) for array in arrays]
            (expected,) = reference(spec, *arrays[:-1])
            kernel(*tensors)
            error = float(np.abs(tensors[-1].numpy() - expected).max() / np.abs(expected).max())
            fused, eager = medians(
                [lambda k=kernel, t=tensors: k(*t), torch_step(spec, arrays)], options.seconds
            )
            row = {"case": name, "rows": rows, "fused_us": fused, "torch_us": eager, "error": error}
            results.append(row)
            print(
                f"{name:<24} {rows:>5} {fused[0]:>9.1f} {fused[1]:>8.1f} {eager[0]:>9.1f} {eager[1]:>8.1f}"
                f" {eager[0] / fused[0]:>6.1f} {error:>8.1e}"
            )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
