"""Prepare and time our compiled libraries; :mod:`benchmarks.inference` runs this in processes of its own.

``prepare`` quantizes a model, appends the cluster-affine step, writes a bundle and compiles it; ``measure`` only loads
what was made, so that nothing of the preparation is in the way.  Bundles are kept under ``--cache``, named by the
sources of the engine, the model and the settings; compiled libraries are kept by the compiler itself.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from benchmarks.peers.common import bits_of, images_of, median_ms, relative_error

__all__ = ["library_path", "main", "measure", "prepare", "prepared", "quantized_bundle"]

CHECKOUT = Path(__file__).resolve().parents[1]
IMAGES = 64  # to calibrate on, as the peers do
CLUSTERS, COMPONENTS = 64, 50


def _name(model: str, precision: str) -> str:
    """A name for what is prepared that changes with everything that it depends on."""
    digest = hashlib.sha256(f"{model} {precision} {IMAGES} {CLUSTERS} {COMPONENTS}".encode())
    folders = ("ptq", "graph", "cluster_affine")
    sources = [path for folder in folders for path in (CHECKOUT / "cat_plugin" / folder).rglob("*.py")]
    own = (CHECKOUT / "benchmarks" / f"{name}.py" for name in ("models", "encoders"))
    for path in (*sorted(sources), *own):
        digest.update(path.read_bytes())
    return f"{model}_{precision.replace(' ', '_')}_{digest.hexdigest()[:12]}"


def _suffix(isa: str) -> str:
    return "" if isa == "native" else f".{isa}"


def library_path(cache: Path, model: str, precision: str, isa: str = "native") -> Path:
    """Where the library of a model at a precision such as ``w4a4`` lies, once it is prepared."""
    return cache / "ours" / f"{_name(model, precision)}{_suffix(isa)}.so"


def _pointer(cache: Path, model: str, precision: str, isa: str) -> Path:
    """The file that names the library which was prepared last, though sources may have changed since."""
    return cache / "ours" / f"{model}_{precision.replace(' ', '_')}{_suffix(isa)}.prepared.json"


def quantized_bundle(model: str, precision: str, data: str | None, bundle: Path) -> dict[str, Any]:
    """Quantize, correct and write the bundle; returns what belongs into the row."""
    import torch

    import cat_plugin
    from benchmarks.models import ENCODERS, MODELS, split_of
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.ptq import QuantSpec, quantize

    torch.manual_seed(0)
    split = split_of(model, data, calibration=IMAGES, evaluation=0)
    batches = split.batches(16, IMAGES)
    reference = MODELS[model](data)
    bits, _, sums = precision.partition(" ")
    weights, activations = bits_of(bits)
    start = time.perf_counter()
    spec = QuantSpec(
        w_bits=weights,
        a_bits=activations,
        preset="fast",
        num_samples=IMAGES,
        bounded_sums=None if sums == "free" else (sums or "pairs"),
        **({"attention_bits": activations, "smoothing": "searched"} if model in ENCODERS else {}),
    )
    quantized, _ = quantize(reference, spec, batches)
    components = None if model in ("resnet20", *ENCODERS) else COMPONENTS
    step = ClusterAffine(mode="diagonal", n_clusters=CLUSTERS, n_components=components, random_state=0)
    corrected = cat_plugin.correct(quantized, reference, batches, step)
    cat_plugin.export_bundle(corrected, batches[0][:2], bundle)
    return {
        "quantize_seconds": round(time.perf_counter() - start, 1),
        "fp32_bytes": sum(p.numel() * 4 for p in reference.parameters() if p.ndim > 1),
    }


def prepare(
    model: str, precision: str, batches: list[int], cache: Path, data: str | None, isa: str = "native"
) -> Path:
    """Make the library, or take what was made before; returns its path."""
    import tvm_backend

    path = library_path(cache, model, precision, isa)
    # The bundle is the same for all instruction sets; what compiling it took is not.
    bundle = library_path(cache, model, precision).with_suffix(".bundle")
    quantized, facts = bundle.with_suffix(".facts.json"), path.with_suffix(".facts.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (bundle.exists() and quantized.exists()):
        quantized.write_text(json.dumps(quantized_bundle(model, precision, data, bundle)))
    report = tvm_backend.compile(bundle, isa, out=path, batch_sizes=batches)
    known = json.loads((facts if facts.exists() else quantized).read_text())
    known |= {"weight_bytes": report.weight_bytes, "float_ops": sorted(set(report.float_ops))}
    if not report.cached:
        known["compile_seconds"] = round(report.seconds, 1)
    facts.write_text(json.dumps(known))
    _pointer(cache, model, precision, isa).write_text(json.dumps({"library": path.name}))
    return path


def prepared(model: str, precision: str, cache: Path, isa: str = "native") -> Path:
    """The library that :func:`prepare` made last."""
    pointer = _pointer(cache, model, precision, isa)
    if not pointer.exists():
        raise FileNotFoundError(
            f"{model} {precision} is not prepared; run without --only, or with --only prepare"
        )
    return pointer.with_name(json.loads(pointer.read_text())["library"])


def layers(library: Any, x: np.ndarray, runs: int) -> list[tuple[dict[str, Any] | None, str, float]]:
    """The calls of one inference in order: kernel entry if it is one, function name, median microseconds."""
    calls: list[tuple[str, float]] = []
    start = 0.0

    def instrument(_function: Any, symbol: str, before: bool, _result: Any, *_arguments: Any) -> int:
        nonlocal start
        now = time.perf_counter()
        if before:
            start = time.perf_counter()
        elif not str(symbol).startswith("vm."):
            calls.append((str(symbol), 1e6 * (now - start)))
        return 0

    # The virtual machine reports every call; its own bookkeeping lies outside of the two readings of the clock.
    virtual_machine = library._machine()
    virtual_machine.set_instrument(instrument)
    samples: list[list[tuple[str, float]]] = []
    for _ in range(runs + 2):
        calls = []
        library(x)
        samples.append(calls)
    library._local.machine = None  # the next call makes one without the instrument
    entries = list(library.manifest["kernels"])
    found = []
    for i, (symbol, _) in enumerate(samples[-1]):
        entry = None
        if entries and entries[0]["name"].split("_")[0] == symbol.split("_")[0]:
            entry = entries.pop(0)
        found.append((entry, symbol, statistics.median(sample[i][1] for sample in samples[2:])))
    return found


def _layer_rows(library: Any, x: np.ndarray, threads: int, runs: int, isa: str) -> list[dict[str, Any]]:
    from benchmarks.kernels import measured_bandwidth, measured_peak
    from tvm_backend.kernels.cpu.isa import select
    from tvm_backend.target import resolve

    target = next(iter(resolve(isa).values()))
    peak = measured_peak(select(target), target) * threads
    bandwidth = measured_bandwidth() * threads
    rows = []
    for entry, symbol, us in layers(library, x, runs):
        row: dict[str, Any] = {"layer": re.sub(r"(_b\d+)?_[0-9a-f]{8}$", "", symbol), "us": round(us, 2)}
        if entry is not None:
            weight = entry["weight_bytes"]
            moved = (entry["bytes"] - weight) * len(x) + weight
            operations = entry["operations"] * len(x)
            weighted = bool(entry["weight_bits"])
            floor = max(operations / peak if weighted else 0.0, moved / bandwidth)
            row |= {"kind": entry["kind"], "output": "x".join(map(str, entry["output"]))}
            row |= {"operations": operations if weighted else 0, "bytes": moved}
            row |= {"gops": round(operations / us / 1e3, 1) if weighted else 0.0}
            row |= {"of_peak": round(operations / us * 1e6 / peak, 3) if weighted else 0.0}
            row |= {"of_floor": round(floor / us * 1e6, 3)}
        rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time the libraries; returns rows and, when asked for, layers."""
    import torch

    import tvm_backend
    from benchmarks.models import MODELS

    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(), "rows": [], "layers": []}
    path = prepared(options.model, options.precision, options.cache, options.isa)
    facts = json.loads(path.with_suffix(".facts.json").read_text())
    library = tvm_backend.load(path)
    reference = MODELS[options.model](options.data)
    for batch in options.batches:
        about = {"model": options.model, "batch": batch, "precision": options.precision}
        images = images_of(options.model, options.data, batch)
        with torch.inference_mode():
            expected = reference(images).numpy()
        # A tensor of TVM's own is used in place, as the peers are given tensors of theirs.
        given = library._tvm.runtime.tensor(images.numpy())
        row = {"peer": "cat-ptq", "version": versions(("apache-tvm",)).get("apache-tvm", "?"), **about}
        row |= {"threads": options.threads, "error": relative_error(library(images.numpy()), expected)}
        row |= median_ms(functools.partial(library, given), options.seconds) | facts
        if "fp32_bytes" in facts:
            row["weights_smaller"] = round(facts["fp32_bytes"] / facts["weight_bytes"], 2)
        calls = layers(library, images.numpy(), 20)
        total = sum(us for _, _, us in calls)
        step = sum(us for entry, _, us in calls if entry and entry["kind"].startswith("cluster_affine"))
        row |= {"affine_us": round(step, 2), "affine_percent": round(100 * step / total, 3)}
        row |= {"variant": library.variant["target"], "load": machine()["load"]}
        result["rows"].append(row)
        if options.layers:
            found = _layer_rows(library, images.numpy(), options.threads, 50, options.isa)
            result["layers"] += [{**about, "number": i, **layer} for i, layer in enumerate(found)]
    return result


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("prepare", "measure"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", required=True, help="such as w4a4")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--isa", default="native", help="a target of tvm_backend.compile")
    parser.add_argument("--out", type=Path, required=True, help="JSON of what was measured")
    options = parser.parse_args()
    os.environ.setdefault("CAT_CACHE_DIR", str(options.cache.resolve()))
    if options.what == "prepare":
        prepare(options.model, options.precision, options.batches, options.cache, options.data, options.isa)
    else:
        options.out.write_text(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
