"""Latency of a compiled library on an idle machine, and beside programs that keep its processors busy.

    python -m benchmarks.busy [--data FOLDER]                              ResNet-20, prepared first where it is not yet
    python -m benchmarks.busy model.so --onnx model.onnx --threads 1,2 --hogs 0,2

``--onnx`` adds ONNX Runtime and OpenVINO, both on that file, under the same conditions; what is not installed becomes a row
that says so.  Each is measured in a process of its own; a hog is a process that computes without a pause.  ResNet-20 is our
W8A8 library, and for the others what ONNX Runtime's own static quantization makes of it (needs onnx and onnxscript).
The table in ``docs/deploy.md`` is filled by ``python -m benchmarks.tables docs/deploy.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.peers.environments import CACHE, CHECKOUT
from cat_plugin.files import write_text

OUT = CHECKOUT / "docs" / "benchmarks" / "busy.json"

_HOG = "while True: pass"
_NAMES = {"library": "cat-ptq", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def _library(path: str, threads: int) -> tuple[Callable[[np.ndarray], Any], list[Any]]:
    import tvm_backend

    library = tvm_backend.load(path, threads=threads)
    return library, library.manifest["inputs"][0]["shape"]


def _onnxruntime(path: str, threads: int) -> tuple[Callable[[np.ndarray], Any], list[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda rows: session.run(None, {given.name: rows}), given.shape


def _openvino(path: str, threads: int) -> tuple[Callable[[np.ndarray], Any], list[Any]]:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(path, "CPU", options)
    shape = [size.get_length() if size.is_static else "N" for size in compiled.input(0).partial_shape]
    request = compiled.create_infer_request()
    return lambda rows: request.infer([rows]), shape


_RUNTIMES = {"library": _library, "onnxruntime": _onnxruntime, "openvino": _openvino}


def _measure(runtime: str, path: str, threads: int, batch: int, seconds: float) -> dict[str, float]:
    """Time calls for some seconds, in this process."""
    call, shape = _RUNTIMES[runtime](path, threads)
    rows = np.random.default_rng(0).standard_normal((batch, *shape[1:])).astype(np.float32)
    for _ in range(5):
        call(rows)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call(rows)
        times.append(time.perf_counter() - start)
    p50, p99 = np.percentile(np.array(times) * 1e3, [50, 99]).tolist()
    return {"p50_ms": round(p50, 4), "p99_ms": round(p99, 4), "calls": len(times)}


def _apart(runtime: str, path: Path, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    """What a process of its own measures; a failure becomes the row's reason."""
    words = [runtime, str(path), str(threads), str(batch), str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("TVM_NUM_THREADS", None)
    command = [sys.executable, "-m", "benchmarks.busy", "--one", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextlib.contextmanager
def _hogs(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    beside = [subprocess.Popen([sys.executable, "-c", _HOG]) for _ in range(count)]
    try:
        yield beside
    finally:
        for hog in beside:
            hog.kill()
            hog.wait()


def measured(
    jobs: list[tuple[str, Path]], threads: list[int], hogs: list[int], batch: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of all combinations, as they are measured.

    Parameters
    ----------
    jobs
        ``library``, ``onnxruntime`` or ``openvino``, and the file that it runs.
    threads, hogs
        Threads of a call, and busy programs beside it.
    batch
        Rows of a call.
    seconds
        For each row.

    Yields
    ------
    dict
        ``runtime``, ``threads``, ``hogs``, ``batch``; ``p50_ms``, ``p99_ms`` and ``calls``, or the ``reason`` why there are none.
    """
    for beside in hogs:
        with _hogs(beside):
            for runtime, path in jobs:
                for count in threads:
                    row = {"runtime": _NAMES[runtime], "threads": count, "hogs": beside, "batch": batch}
                    yield row | _apart(runtime, path, count, batch, seconds)


def prepared(cache: Path, data: str | None) -> tuple[Path, Path]:
    """ResNet-20 as our W8A8 library, and as ONNX Runtime's own quantization in an ONNX file; made where they are missing."""
    from benchmarks.inference_ours import prepare
    from benchmarks.peers.onnxruntime_speed import export, quantize

    folder = cache / "models"
    folder.mkdir(parents=True, exist_ok=True)
    file = quantize(export("resnet20", data, folder), "resnet20", data)
    return prepare("resnet20", "w8a8", [1, 16], cache, data), file


def main() -> None:
    """Measure all combinations and print a table."""
    if sys.argv[1:2] == ["--one"]:
        runtime, path, threads, batch, seconds = sys.argv[2:]
        print(json.dumps(_measure(runtime, path, int(threads), int(batch), float(seconds))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path, nargs="?", help="a compiled library (default: ResNet-20's)")
    parser.add_argument("--onnx", type=Path, help="the same model for ONNX Runtime and OpenVINO")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (%(default)s)")
    parser.add_argument("--hogs", default="0,1,2", help="numbers of busy programs beside it (%(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row (%(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where ResNet-20 is kept (%(default)s)")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--prepare", action="store_true", help="make ResNet-20 and measure nothing")
    parser.add_argument("--out", type=Path, help=f"JSON to write (of ResNet-20: {OUT})")
    options = parser.parse_args()
    library, onnx, out = options.library, options.onnx, options.out
    if library is None:
        library, onnx = prepared(options.cache, options.data)
        out = out or OUT
        if options.prepare:
            print(f"{library}\n{onnx}")
            return
    jobs = [("library", library)]
    if onnx:
        jobs += [("onnxruntime", onnx), ("openvino", onnx)]
    where, rows = machine(), []
    print(f"{where['cpu']['model']}, {where['cpu']['cores']} cores, load {where['load']}")
    print(f"{'runtime':12} {'threads':>7} {'hogs':>4} {'p50 ms':>9} {'p99 ms':>9}")
    threads, hogs = (list(map(int, text.split(","))) for text in (options.threads, options.hogs))
    for row in measured(jobs, threads, hogs, options.batch, options.seconds):
        rows.append(row)
        shown = row.get("reason") or f"{row['p50_ms']:9.3f} {row['p99_ms']:9.3f}"
        print(f"{row['runtime']:12} {row['threads']:7} {row['hogs']:4} {shown}", flush=True)
    if out:
        write_text(out, json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
