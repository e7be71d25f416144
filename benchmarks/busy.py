"""Latency of a compiled library on an idle machine, and beside programs that keep its processors busy.

    python -m benchmarks.busy model.so --threads 1,2 --hogs 0,2 [--onnx model.onnx]

``--onnx`` adds ONNX Runtime, and OpenVINO where it is installed, under the same conditions. Each is measured in a process
of its own; a hog is a process that computes without a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine

_HOG = "while True: pass"


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
    return {"p50_ms": p50, "p99_ms": p99, "calls": len(times)}


def _apart(runtime: str, path: Path, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    words = [runtime, str(path), str(threads), str(options.batch), str(options.seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("TVM_NUM_THREADS", None)
    command = [sys.executable, "-m", "benchmarks.busy", "--one", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all combinations and print a table."""
    if sys.argv[1:2] == ["--one"]:
        runtime, path, threads, batch, seconds = sys.argv[2:]
        print(json.dumps(_measure(runtime, path, int(threads), int(batch), float(seconds))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="a compiled library")
    parser.add_argument("--onnx", type=Path, help="the same model for ONNX Runtime and OpenVINO")
    parser.add_argument("--threads", default="1,2", help="numbers of threads")
    parser.add_argument("--hogs", default=f"0,{os.cpu_count()}", help="numbers of busy programs beside it")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    jobs = [("library", options.library)]
    if options.onnx:
        jobs += [("onnxruntime", options.onnx), ("openvino", options.onnx)]
    rows = []
    where = machine()
    print(f"{where['cpu']['model']}, {where['cpu']['cores']} cores, load {where['load']}")
    print(f"{'runtime':12} {'threads':>7} {'hogs':>4} {'p50 ms':>9} {'p99 ms':>9}")
    for hogs in map(int, options.hogs.split(",")):
        beside = [subprocess.Popen([sys.executable, "-c", _HOG]) for _ in range(hogs)]
        try:
            for runtime, path in jobs:
                for threads in map(int, options.threads.split(",")):
                    found = _apart(runtime, path, options, threads)
                    rows.append({"runtime": runtime, "threads": threads, "hogs": hogs, **found})
                    shown = found.get("error") or f"{found['p50_ms']:9.2f} {found['p99_ms']:9.2f}"
                    print(f"{runtime:12} {threads:7} {hogs:4} {shown}", flush=True)
        finally:
            for hog in beside:
                hog.kill()
                hog.wait()
    if options.out:
        options.out.write_text(
            json.dumps({"machine": where, "batch": options.batch, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
