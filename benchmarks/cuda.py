"""Check and time every CUDA kernel, in two steps, so that the machine with the GPU needs no compiler.

Where the libraries are built (no GPU needed)::

    python -m benchmarks.cuda build --out libraries --arch sm_90 [--bundle BUNDLE ...]

Where the GPU is (TVM's runtime and numpy; PyTorch for the comparison)::

    python -m benchmarks.cuda run libraries --out results

``run`` first compares everything with its reference: whole models on the rows that travel with them, at each of their batch sizes,
then each kernel.  Then it takes medians of many launches, models first, with and without CUDA graphs, and kernels with enough sets of
buffers that the second-level cache does not hold them; then, if compute-sanitizer is installed, models run under its initcheck and
memcheck for at most a quarter of ``--seconds``; at last come PyTorch's times, as long as ``--seconds`` allow.  It writes
``results/cuda.json`` row by row, and a table.  The floor of a kernel is the larger of its bytes over the measured copy bandwidth and
its operations over the rate given by ``--rate``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda_models, cuda_sanitizer, cuda_torch
from benchmarks.cuda_build import build, random_inputs
from benchmarks.cuda_models import median

CACHE_BYTES = 1 << 27
"""Buffers are taken in turn until they exceed this: twice the second-level cache of an H200."""


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


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


class Results:
    """Rows, written as they come: a run that is cut off leaves what it measured."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts, self.rows = path, facts, list[dict[str, Any]]()

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, or what has changed of one."""
        if row not in self.rows:
            self.rows.append(row)
        hidden = ("resources", "spec", "file", "rows", "given", "result", "sha256")
        shown = [
            {key: value for key, value in one.items() if key not in hidden}
            | ({"batch": one["rows"]} if "rows" in one else {})
            for one in self.rows
        ]
        text = json.dumps({"machine": self.facts, "results": shown}, indent=1)
        self.path.write_text(text + "\n")


def run(options: argparse.Namespace) -> None:
    """Check, then time."""
    import tvm
    import tvm.runtime.vm

    from tvm_backend.cuda_runtime import load_cuda_runtime

    deadline = time.monotonic() + options.seconds
    described = json.loads((options.libraries / "cuda.json").read_text())
    entries = [entry for entry in described["entries"] if options.only in entry["name"]]
    # PyTorch compiles in processes of its own meanwhile, into its cache.
    waiting = [] if options.emulated else cuda_torch.compile_ahead(entries)
    load_cuda_runtime(tvm)
    device, torch = tvm.cuda(0), None if options.emulated else _torch()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = _machine(torch, tvm)
    results = Results(options.out / "cuda.json", facts)
    print(json.dumps(facts), flush=True)
    repeats = 0 if options.emulated else options.repeats
    models = []
    for entry in entries:
        path = options.libraries / f"{entry['file']}.so"
        if entry["kind"] == "model" and path.exists():
            models += cuda_models.checked(path, entry["name"], results.keep)
    kernels = [
        _checked(entry, options.libraries, tvm, device, results.keep)
        for entry in entries
        if entry["kind"] != "model"
    ]
    wrong = [row["name"] for row in results.rows if not row["correct"]]
    print(f"{len(results.rows) - len(wrong)} correct, {len(wrong)} wrong {wrong}", flush=True)
    cuda_torch.wait(waiting, deadline - options.seconds / 2)
    for graphs in (True, False):
        cuda_models.time_all(models, tvm, device, graphs, repeats, results.keep)
    if torch:
        for model in models:
            cuda_torch.time_eager(torch, model.row, model.data, repeats, results.keep)
    facts["copy_bytes_per_second"] = bandwidth = _bandwidth(torch) if torch else None
    for kernel in kernels:
        _time(kernel, tvm, device, bandwidth, options, repeats)
        results.keep(kernel["row"])
        _print_row(kernel["row"])
    if not options.emulated:
        paths = dict.fromkeys(model.path for model in models)
        cuda_sanitizer.sanitize(tuple(paths), time.monotonic() + options.seconds / 4, results.keep)
    if torch:
        cuda_torch.time_compiled(
            torch, [(model.row, model.data) for model in models], repeats, deadline, results.keep
        )
        for kernel in kernels:
            if time.monotonic() < deadline:
                _time_torch(torch, kernel, repeats)
                results.keep(kernel["row"])
    print(f"{len(results.rows)} rows", flush=True)


def _checked(
    entry: dict[str, Any], libraries: Path, tvm: Any, device: Any, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A kernel, loaded, called once and compared with its reference."""
    module = tvm.runtime.load_module(str(libraries / f"{entry['file']}.so"))
    arrays, expected = _data(entry, libraries)
    if expected is None:
        blank = [np.full(entry["result"]["shape"], 77, entry["result"]["dtype"])]
    else:
        blank = [np.full_like(array, 77) for array in expected]
    tensors = [tvm.runtime.tensor(array, device) for array in (*arrays, *blank)]
    kernel = module["main"]
    kernel(*tensors)
    found = [tensor.numpy() for tensor in tensors[-len(blank) :]]
    if expected is None:
        error = float(hashlib.sha256(found[0].tobytes()).hexdigest() != entry["sha256"])
    else:
        error = max(map(_error, found, expected))
    row = dict(entry, error=error, correct=bool(error <= (0 if entry["kind"] == "integer" else 1e-3)))
    keep(row)
    return {"row": row, "kernel": kernel, "arrays": arrays, "blank": blank, "tensors": tensors}


def _sets(kernel: dict[str, Any]) -> int:
    """How many sets of buffers the second-level cache does not hold."""
    size = kernel["arrays"][0].nbytes + sum(array.nbytes for array in kernel["blank"])
    return max(1, min(64, -(-CACHE_BYTES // size)))


def _time(
    kernel: dict[str, Any],
    tvm: Any,
    device: Any,
    bandwidth: float | None,
    options: argparse.Namespace,
    repeats: int,
) -> None:
    # Parameters are shared, as in use; data and results are taken in turn.
    count = len(kernel["blank"])
    first, *shared = kernel["tensors"][: len(kernel["tensors"]) - count]
    turns = [kernel["tensors"]]
    for _ in range(1, 1 if options.emulated else _sets(kernel)):
        made = [
            tvm.runtime.empty(tensor.shape, str(tensor.dtype), device)
            for tensor in kernel["tensors"][-count:]
        ]
        turns.append([first.copyto(device), *shared, *made])
    row = kernel["row"]
    row["microseconds"] = median(_launcher(kernel["kernel"], turns), device.sync, repeats)
    if bandwidth:
        by_bytes, by_rate = row["bytes"] / bandwidth, row["operations"] / _rate(row, options)
        row["floor_microseconds"] = max(by_bytes, by_rate) * 1e6
        row["ratio"] = row["microseconds"] / row["floor_microseconds"]


def _time_torch(torch: Any, kernel: dict[str, Any], repeats: int) -> None:
    row = kernel["row"]
    if row["kind"] != "cluster_affine" or row["spec"]["op"] != "cat::cluster_affine":
        return
    step, tensors = _eager(torch, row, kernel["arrays"])
    for label, function in (("eager", step), ("compile", torch.compile(step, dynamic=False))):
        launcher = _torch_launcher(function, tensors, _sets(kernel))
        row[f"torch_{label}_microseconds"] = median(launcher, torch.cuda.synchronize, repeats)


def _data(entry: dict[str, Any], libraries: Path) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Inputs of a kernel, made anew for their size but for packed weights, and its results where they can be computed here."""
    if entry["kind"] == "integer":
        with np.load(libraries / f"{entry['file']}.npz") as loaded:
            stored = [loaded[f"arr_{i}"] for i in range(len(loaded.files))]
        return [*random_inputs(entry["given"]), *stored], None
    if entry["kind"] == "rows":
        arrays = random_inputs(entry["given"])
        return arrays, [_row_function(entry, *(array.astype(float) for array in arrays)).astype(np.float32)]
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


def _row_function(entry: dict[str, Any], x: np.ndarray, *constants: np.ndarray) -> np.ndarray:
    """Softmax or LayerNorm in float64."""
    if entry["function"] == "softmax":
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    centred = x - x.mean(axis=1, keepdims=True)
    gamma, beta = constants
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + entry["epsilon"]) * gamma + beta


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
    running.add_argument("--repeats", type=int, default=20)
    running.add_argument(
        "--seconds", type=float, default=600, help="how long it may take, PyTorch's compiler included"
    )
    running.add_argument(
        "--emulated", action="store_true", help="only rehearse, on the tests' emulated device"
    )
    running.add_argument(
        "--rate", type=float, default=67e12, help="float32 operations a second; an H100's 67e12"
    )
    running.add_argument(
        "--integer-rate", type=float, default=1979e12, help="int8 operations; an H100's 1979e12"
    )
    running.set_defaults(function=run)
    calling = commands.add_parser("call", help="what `run` starts under compute-sanitizer")
    calling.add_argument("library", type=Path)
    calling.set_defaults(function=lambda options: cuda_sanitizer.call_once(options.library))
    ahead = commands.add_parser(
        "compile-ahead", help="what `run` starts to fill the cache of PyTorch's compiler"
    )
    ahead.add_argument("network")
    ahead.add_argument("batches", type=int, nargs="+")
    ahead.set_defaults(function=lambda options: cuda_torch.fill_cache(options.network, options.batches))
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
