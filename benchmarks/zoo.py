"""The networks of the tests' zoo: compiled at W8A8 beside PyTorch in float32, and what the operators left in float take.

    python -m benchmarks.zoo --kept /tmp/zoo
    python -m benchmarks.zoo --kept /tmp/zoo --networks c2f unet --batches 64

Networks are tiny; so at batch 1 it is mostly calls that are timed.  Library and network run in turns in one process, and the
shortest of many calls counts, because other work on the machine can only lengthen it.  Rows are sorted by ``times_faster``,
PyTorch's microseconds over ours.  ``float_percent`` is the share of functions that are no kernels of ours, ``slowest_float``
the slowest of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.inference_ours import layers
from benchmarks.rows import merge
from benchmarks.tables import table

__all__ = ["main"]

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "zoo.json"
COLUMNS = [
    "network", "batch", "pytorch_us", "us", "times_faster", "float_percent", "slowest_float", "float_ops",
]  # fmt: skip


def shortest(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """The shortest of many runs of each call, in turns, in microseconds."""
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            for _ in range(5):
                start = time.perf_counter()
                call()
                best[i] = min(best[i], 1e6 * (time.perf_counter() - start))
    return best


def bundle_of(name: str, folder: Path) -> Path:
    """The network quantized to 8 bits, or what is there."""
    from cat_plugin import export_bundle
    from cat_plugin.ptq import QuantSpec, quantize
    from tests.zoo import ZOO

    path = folder / name
    if not path.exists():
        inputs = ZOO[name].inputs(32)
        spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=32)
        quantized, _ = quantize(ZOO[name].build(), spec, inputs.split(16))
        export_bundle(quantized, inputs[:2], path)
    return path


def measure(name: str, batches: list[int], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """One row for each batch size."""
    import torch

    import tvm_backend
    from tests.zoo import ZOO

    report = tvm_backend.compile(bundle_of(name, folder), out=folder / f"{name}.so", batch_sizes=batches)
    library, model = tvm_backend.load(folder / f"{name}.so"), ZOO[name].build()
    rows = []
    for batch in batches:
        inputs = ZOO[name].inputs(batch)
        given = library._tvm.runtime.tensor(inputs.numpy())
        with torch.inference_mode():
            eager, ours = shortest([lambda x=inputs: model(x), lambda x=given: library(x)], seconds)
        calls = layers(library, given, 20)
        total = sum(us for _, _, us in calls)
        floats = [(symbol, us) for entry, symbol, us in calls if entry is None]
        slowest, us = max(floats, key=lambda call: call[1], default=("", 0.0))
        rows.append(
            {
                "row": f"{name}/{batch}",
                "network": name,
                "batch": batch,
                "pytorch_us": round(eager, 1),
                "us": round(ours, 1),
                "times_faster": round(eager / ours, 2),
                "float_percent": round(100 * sum(us for _, us in floats) / total),
                "slowest_float": f"{slowest} {us:.1f}" if slowest else "",
                "float_ops": " ".join(sorted(set(report.float_ops))),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, merge into the JSON and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", help="names in tests/zoo (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="timed a row (default: %(default)s)")
    parser.add_argument("--kept", type=Path, required=True, help="folder of quantized networks and libraries")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into (%(default)s)")
    options = parser.parse_args(argv)
    if os.environ.get("TVM_NUM_THREADS") != str(options.threads):
        os.environ["TVM_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.zoo", *(argv or sys.argv[1:])])
    import torch

    from tests.zoo import ZOO

    torch.set_num_threads(options.threads)
    options.kept.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.networks or list(ZOO):
        print(name, file=sys.stderr, flush=True)
        rows += measure(name, options.batches, options.kept, options.seconds)
        rows.sort(key=lambda row: float(row["times_faster"]))
        merge(options.out, rows, [row["row"] for row in rows])
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
