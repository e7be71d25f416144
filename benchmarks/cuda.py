"""Check and time every CUDA kernel, in two steps, so that the machine with the GPU needs no compiler.

Where the libraries are built (no GPU needed)::

    python -m benchmarks.cuda build --out libraries --arch sm_90 [--bundle BUNDLE ...]

Where the GPU is (TVM's runtime and numpy; PyTorch for the comparison)::

    python -m benchmarks.cuda run libraries --out results

``run`` first compares each kernel with its reference, then takes medians of many
launches, with enough sets of buffers that the second-level cache does not hold them, and writes ``results/cuda.json``
and a table.  The floor of a kernel is the larger of its bytes over the measured copy bandwidth and its operations over
the rate given by ``--rate``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cuda_build import build

MODEL_BATCHES = (1, 16, 128)
CACHE_BYTES = 1 << 27
"""Buffers are taken in turn until they exceed this: twice the second-level cache of an H200."""


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def median(function: Callable[[int], Any], synchronize: Callable[[], Any], repeats: int) -> float:
    """Median time of a launch in microseconds: batches of launches between two synchronizations."""
    for i in range(3):
        function(i)
    synchronize()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(20):
            function(i)
        synchronize()
        samples.append((time.perf_counter() - start) / 20 * 1e6)
    return statistics.median(samples)


def _eager(
    torch: Any, entry: dict[str, Any], arrays: list[np.ndarray]
) -> tuple[Callable[..., Any], list[Any]]:
    """The diagonal step written in PyTorch, for eager mode and torch.compile."""
    tensors = [torch.from_numpy(array).cuda() for array in arrays[:6]]

    def step(z: Any, mean: Any, components: Any, centroids: Any, gamma: Any, beta: Any) -> Any:
        x = z.float()
        p = (x - mean) @ components.t() if components.shape[0] else x
        score = (centroids * centroids).sum(1) - 2 * (p @ centroids.t())
        k = score.argmin(1)
        y = x + entry["spec"]["alpha"] * (gamma[k] * x + beta[k] - x)
        if entry["spec"]["finish"] == "topk":
            return y.topk(entry["spec"]["top_k"])
        return (y.softmax(1) if entry["spec"]["finish"] == "softmax" else y).to(z.dtype)

    return step, tensors


def run(options: argparse.Namespace) -> None:
    """Check, then time."""
    import ctypes

    import tvm
    import tvm.runtime.vm

    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    device, torch = tvm.cuda(0), _torch()
    described = json.loads((options.libraries / "cuda.json").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    facts = _machine(torch, tvm)
    bandwidth = _bandwidth(torch) if torch else None
    facts["copy_bytes_per_second"] = bandwidth
    kept: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        """Write the row at once: a run that is cut off leaves what it measured."""
        shown = {key: value for key, value in row.items() if key not in ("resources", "spec", "file", "rows")}
        kept.append(shown | ({"batch": row["rows"]} if "rows" in row else {}))
        text = json.dumps({"machine": facts, "results": kept}, indent=1)
        (options.out / "cuda.json").write_text(text + "\n")

    print(json.dumps(facts))
    print(f"{'kernel':<44} {'us':>9} {'floor':>8} {'ratio':>6} {'eager':>9} {'compile':>9} {'error':>9}")
    for entry in described["entries"]:
        if entry["kind"] == "model" or options.only not in entry["name"]:
            continue
        module = tvm.runtime.load_module(str(options.libraries / f"{entry['file']}.so"))
        arrays, expected = _data(entry, options.libraries)
        blank = [np.full_like(array, 77) for array in expected]
        size = arrays[0].nbytes + sum(array.nbytes for array in expected)
        sets = max(1, min(64, -(-CACHE_BYTES // size)))
        # Parameters are shared, as in use; data and results are taken in turn.
        shared = [tvm.runtime.tensor(array, device) for array in arrays[1:]]
        turns = [
            [
                tvm.runtime.tensor(arrays[0], device),
                *shared,
                *(tvm.runtime.tensor(array, device) for array in blank),
            ]
            for _ in range(sets)
        ]
        kernel = module["main"]
        kernel(*turns[0])
        found = [tensor.numpy() for tensor in turns[0][-len(expected) :]]
        error = max(map(_error, found, expected))
        row = dict(entry, error=error, correct=bool(error <= (0 if entry["kind"] == "integer" else 1e-3)))
        row["microseconds"] = median(_launcher(kernel, turns), device.sync, options.repeats)
        if bandwidth:
            by_bytes, by_rate = entry["bytes"] / bandwidth, entry["operations"] / _rate(entry, options)
            row["floor_microseconds"] = max(by_bytes, by_rate) * 1e6
            row["ratio"] = row["microseconds"] / row["floor_microseconds"]
        if torch and entry["kind"] == "cluster_affine" and entry["spec"]["op"] == "cat::cluster_affine":
            step, tensors = _eager(torch, entry, arrays)
            for label, function in (("eager", step), ("compile", torch.compile(step))):
                row[f"torch_{label}_microseconds"] = median(
                    _torch_launcher(function, tensors, sets), torch.cuda.synchronize, options.repeats
                )
        keep(row)
        _print_row(row)
    _run_models(described, options, tvm, device, keep)
    wrong = [row["name"] for row in kept if not row["correct"]]
    print(f"{len(kept) - len(wrong)} correct, {len(wrong)} wrong {wrong}")


def _data(entry: dict[str, Any], libraries: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs of a kernel and its results; those of the cluster-affine step are made anew, for their size."""
    if entry["kind"] == "integer":
        with np.load(libraries / f"{entry['file']}.npz") as loaded:
            *arrays, expected = [loaded[f"arr_{i}"] for i in range(len(loaded.files))]
        return arrays, [expected]
    from tvm_backend.kernels.cluster_affine.reference import reference
    from tvm_backend.kernels.cluster_affine.spec import RESULTS, ClusterAffineSpec

    spec, rows = ClusterAffineSpec(**entry["spec"]), entry["rows"]
    rng = np.random.default_rng(rows)
    arrays = [
        rng.standard_normal([rows if extent is None else extent for extent in shape]).astype(dtype)
        for name, shape, dtype in spec.arguments()
        if name not in RESULTS
    ]
    return arrays, [
        found.astype("int64" if found.dtype == np.int64 else spec.dtype) for found in reference(spec, *arrays)
    ]


def _launcher(kernel: Any, turns: list[list[Any]]) -> Callable[[int], Any]:
    return lambda i: kernel(*turns[i % len(turns)])


def _torch_launcher(function: Any, tensors: list[Any], sets: int) -> Callable[[int], Any]:
    inputs = [tensors[0].clone() for _ in range(sets)]
    return lambda i: function(inputs[i % sets], *tensors[1:])


def _rate(entry: dict[str, Any], options: argparse.Namespace) -> float:
    """Operations a second that the arithmetic units could do."""
    return options.integer_rate if entry["kind"] == "integer" else options.rate


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of integers that differ, or the norm of the difference over that of what is expected."""
    if expected.dtype.kind in "iu":
        return float((found != expected).mean())
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide) / np.linalg.norm(wide))


def _print_row(row: dict[str, Any]) -> None:
    floor = row.get("floor_microseconds")
    cells = [
        f"{row['name']:<44} {row['microseconds']:>9.1f}",
        f"{floor:>8.1f} {row['microseconds'] / floor:>6.2f}" if floor else f"{'-':>8} {'-':>6}",
        *(
            f"{row[key]:>9.1f}" if key in row else f"{'-':>9}"
            for key in ("torch_eager_microseconds", "torch_compile_microseconds")
        ),
        f"{row['error']:>9.1e}",
    ]
    print(" ".join(cells))


def _run_models(
    described: dict[str, Any],
    options: argparse.Namespace,
    tvm: Any,
    device: Any,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Whole models, inputs and results on the device: verified on the rows that travel with them, then timed."""
    import tvm_backend
    from cat_plugin.errors import LibraryError
    from tvm_backend.verify import verify

    torch = _torch()
    for entry in described["entries"]:
        if entry["kind"] != "model" or options.only not in entry["name"]:
            continue
        library = tvm_backend.load(options.libraries / f"{entry['file']}.so")
        fault = None
        try:
            verify(library)
        except LibraryError as error:
            fault = str(error)
        (described_input,) = library.manifest["inputs"]
        for batch in MODEL_BATCHES:
            shape = [batch if isinstance(extent, str) else extent for extent in described_input["shape"]]
            data = np.random.default_rng(0).standard_normal(shape).astype(described_input["dtype"])
            tensor = tvm.runtime.tensor(data, device)
            row = {
                "name": f"{entry['name']}, N {batch}",
                "kind": "model",
                "correct": fault is None,
                "fault": fault,
            }
            row["microseconds"] = median(
                lambda _, run=library, x=tensor: run(x), device.sync, options.repeats
            )
            if torch:
                row |= _torch_model(torch, entry["name"], data, options.repeats)
            keep(row)
            cells = "".join(
                f" {row.get(f'torch_{label}_microseconds', float('nan')):>9.1f}"
                for label in ("eager", "half", "compile")
            )
            print(f"{row['name']:<44} {row['microseconds']:>9.1f}{cells}  {fault or 'verified'}", flush=True)


def _torch_model(torch: Any, name: str, data: np.ndarray, repeats: int) -> dict[str, float]:
    """The full-precision network in PyTorch: float32, float16, and float16 compiled with CUDA graphs, in microseconds.

    Weights are random: they are of no consequence for the time.
    """
    from benchmarks.models import CifarResNet, MobileNetV2, ResNet18

    made = {"resnet20": CifarResNet, "mobilenet_v2": MobileNetV2, "resnet18": ResNet18}.get(
        name.rsplit("_", 1)[0]
    )
    if made is None:
        return {}
    model = made().eval().cuda().to(memory_format=torch.channels_last)
    x = torch.from_numpy(data).cuda().to(memory_format=torch.channels_last)
    found = {}
    with torch.inference_mode():
        found["eager"] = median(lambda _: model(x), torch.cuda.synchronize, repeats)
        model, x = model.half(), x.half()
        found["half"] = median(lambda _: model(x), torch.cuda.synchronize, repeats)
        compiled = torch.compile(model, mode="reduce-overhead")
        found["compile"] = median(lambda _: compiled(x), torch.cuda.synchronize, repeats)
    return {f"torch_{label}_microseconds": value for label, value in found.items()}


def _machine(torch: Any, tvm: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"tvm": tvm.__version__, "torch": torch.__version__ if torch else None}
    facts["utc"] = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        facts["gpu"] = "none"
    if torch:
        facts["cuda"] = torch.version.cuda
    return facts


def _bandwidth(torch: Any) -> float:
    """Bytes a second of a large copy on the device, read and written ones counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    microseconds = median(lambda _: target.copy_(source), torch.cuda.synchronize, 10)
    return float(2 * 4 * source.numel() / microseconds * 1e6)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    building = commands.add_parser("build", help="compile the libraries; no GPU needed")
    building.add_argument("--out", type=Path, default=Path("libraries"))
    building.add_argument("--arch", default="sm_90")
    building.add_argument(
        "--bundle", nargs="*", default=[], help="bundles of whole models to compile as well"
    )
    building.add_argument(
        "--model",
        nargs="*",
        default=[],
        help="benchmark models to quantize and compile, such as resnet18_w8a8",
    )
    building.add_argument(
        "--bundles", type=Path, default=Path("bundles"), help="where bundles of --model are kept"
    )
    building.add_argument("--data", help="the folder of weights and images, as for benchmarks.inference")
    building.add_argument("--models-only", action="store_true")
    building.set_defaults(function=build)
    running = commands.add_parser("run", help="check and time them")
    running.add_argument("libraries", type=Path)
    running.add_argument("--out", type=Path, default=Path("results"))
    running.add_argument("--only", default="", help="kernels whose name holds this")
    running.add_argument("--repeats", type=int, default=50)
    running.add_argument(
        "--rate", type=float, default=67e12, help="float32 operations a second; an H100's 67e12"
    )
    running.add_argument(
        "--integer-rate", type=float, default=1979e12, help="int8 operations; an H100's 1979e12"
    )
    running.set_defaults(function=run)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
