"""Time the convolutions of ResNet-18 with the kernels for each instruction set that the processor has.

    python -m benchmarks.instruction_sets --out docs/benchmarks/instruction_sets.json

One image, one thread.  A row gives the sum over all convolutions, and the share of the measured peak of the instruction.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.kernels import INPUT, measure, measured_peak
from benchmarks.layer_shapes import NETWORKS
from benchmarks.machine import machine
from tvm_backend.kernels.cpu.isa import select
from tvm_backend.processor import cpu_features
from tvm_backend.target import PORTABLE, required_features, resolve

__all__ = ["main"]

NETWORK = "ResNet-18"


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if os.environ.get("TVM_NUM_THREADS") != "1":
        os.environ["TVM_NUM_THREADS"] = "1"
        os.execv(
            sys.executable, [sys.executable, "-m", "benchmarks.instruction_sets", *(argv or sys.argv[1:])]
        )
    available = cpu_features() or frozenset()
    rows = []
    for name in PORTABLE:
        (target,) = resolve(name).values()
        if not set(required_features(target)) <= available:
            print(f"{name}: not on this processor")
            continue
        isa = select(target)
        for bits in options.bits:
            used = isa.for_values(INPUT.qmax, (1 << bits) - 1 if bits < 8 else 128)
            peak = measured_peak(used, target)
            layers = NETWORKS[NETWORK]
            timed = [(layer.count, measure(layer, bits, 1, target, 1)) for layer in layers]
            seconds = sum(count * row["seconds"] for count, row in timed)
            operations = sum(count * row["operations"] for count, row in timed)
            row = {
                "variant": name,
                "kernel": timed[1][1]["variant"],
                "bits": bits,
                "ms": round(1e3 * seconds, 2),
                "GOPs": round(operations / seconds / 1e9),
                "peak_GOPs": round(peak / 1e9),
                "of_peak": f"{operations / seconds / peak:.0%}",
            }
            print(row, flush=True)
            rows.append(row)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
