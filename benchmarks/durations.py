"""How long quantizing and compiling take: preset ``fast`` from the images in memory, a first compile, and one of a changed model.

Every row is measured in a process of its own and merged into one JSON::

    python -m benchmarks.durations --rows 'quantize/*'
    python -m benchmarks.durations --rows 'compile/*'

``compile/MODEL/TARGET`` begins with an empty cache and then compiles a model of the same shapes with other weights
(``again_seconds``): the bundles ``w8a8`` and ``w8a8 free`` that ``benchmarks.inference --only prepare`` made last.  Both are
commands, ``cat-ptq compile``, from their start to their end: importing TVM and PyTorch counts.  ``again_in_process`` is the second of
two calls from Python.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.machine import machine
from benchmarks.memory import PeakMemory
from benchmarks.peers.common import bits_of
from benchmarks.peers.environments import CACHE, CHECKOUT

OUT = CHECKOUT / "docs" / "benchmarks" / "durations.json"
NAMES = (
    "quantize/resnet18/w2a2/64",
    "quantize/resnet18/w8a8/64",
    "quantize/resnet20/w2a2/1024",
    "quantize/resnet20/w4a4/1024",
    "compile/resnet18/native",
    "compile/resnet20/native",
    "compile/mobilenet_v2/native",
    "compile/resnet18/portable",
)


def _quantize(model: str, bits: str, count: int, data: str | None) -> dict[str, Any]:
    import torch

    from benchmarks.models import MODELS, split_of
    from cat_plugin.ptq import QuantSpec, quantize

    torch.manual_seed(0)
    network = MODELS[model](data)
    batches = split_of(model, data, count, 0).batches(32, count)
    weights, activations = bits_of(bits)
    spec = QuantSpec(w_bits=weights, a_bits=activations, preset="fast", num_samples=count)
    with PeakMemory() as memory:
        start, used = time.perf_counter(), time.process_time()
        quantize(network, spec, [(batch,) for batch in batches])
        taken = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - used,
        }
    peak = (memory.anonymous - memory.before) >> 20
    return {name: round(value, 1) for name, value in taken.items()} | {"peak_mb": peak}


def _bundle(cache: Path, model: str, precision: str) -> Path:
    """The newest one."""
    named = (cache / "ours").glob(f"{model}_{precision}_*.bundle")
    found = [path for path in named if path.stem.removeprefix(f"{model}_{precision}_").isalnum()]
    if not found:
        raise FileNotFoundError(f"no bundle of {model} {precision}; run benchmarks.inference --only prepare")
    return max(found, key=lambda path: path.stat().st_mtime)


def _compile(model: str, target: str, cache: Path) -> dict[str, Any]:
    """Both compilations, each as a user's command, which begins with its imports; then the same in this process."""
    command = [sys.executable, "-m", "cat_plugin", "--quiet", "compile"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "CAT_CACHE_DIR": folder}
        for name, precision in (("seconds", "w8a8"), ("again_seconds", "w8a8_free")):
            given = [str(_bundle(cache, model, precision)), "--target", target, "--out", f"{folder}/model.so"]
            start = time.perf_counter()
            subprocess.run([*command, *given], env=variables, check=True)
            found[name] = round(time.perf_counter() - start, 1)
    return found | {"again_in_process": _again_in_process(model, target, cache)}


def _again_in_process(model: str, target: str, cache: Path) -> float:
    """Seconds of the second compilation where a process makes both, as tuning does: nothing is imported any more."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CAT_CACHE_DIR"] = folder
        from tvm_backend import compile as compile_library

        for precision in ("w8a8", "w8a8_free"):
            start = time.perf_counter()
            compile_library(_bundle(cache, model, precision), target=target, out=f"{folder}/model.so")
    return round(time.perf_counter() - start, 1)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    what, model, *rest = name.split("/")
    row: dict[str, Any] = {"row": name, "what": what, "model": model, "threads": options.threads}
    row["load"] = machine()["load"]
    if what == "quantize":
        bits, count = rest
        return row | {"bits": bits, "images": int(count)} | _quantize(model, bits, int(count), options.data)
    return row | {"target": rest[0]} | _compile(model, rest[0], options.cache)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE, help="of benchmarks.inference (%(default)s)")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into (%(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    threads = str(options.threads)
    variables = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": threads}
    common = ["--threads", threads, "--cache", str(options.cache.resolve())]
    common += ["--data", options.data] if options.data else []
    for name in NAMES:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in options.rows):
            continue
        command = [sys.executable, "-m", "benchmarks.durations", "--one", name, *common]
        done = subprocess.run(
            command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            row = {"row": name, "reason": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        rows.merge(options.out, [row], NAMES)


if __name__ == "__main__":
    main()
