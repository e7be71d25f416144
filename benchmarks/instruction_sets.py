"""Time the convolutions of a network with the kernels for each instruction set that the processor has.

    python -m benchmarks.instruction_sets --out docs/benchmarks/instruction_sets.json

One image, one thread.  A row gives the sum over all convolutions, and the share of the measured peak of the very instructions.
Beside it, ``instruction_sets_layers.json`` has a row for each layer; ``--before`` puts the times of an older run beside these.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.kernels import measure, measured_peak
from benchmarks.layer_shapes import NETWORKS
from benchmarks.machine import machine
from tvm_backend.kernels.cpu.isa import select
from tvm_backend.processor import cpu_features
from tvm_backend.target import PORTABLE, required_features, resolve

__all__ = ["layers_path", "main"]

PRECISIONS = ("w8a8", "w7a8", "w6a8", "w4a8", "w4a4", "w2a2")


def layers_path(out: Path) -> Path:
    """Where the rows of the layers go."""
    return out.with_name(f"{out.stem}_layers.json")


def _timed(variant: str, precision: str, network: str) -> list[dict[str, Any]]:
    """A row for each layer of a network."""
    (target,) = resolve(variant).values()
    weight_bits, activation_bits = (int(part) for part in precision[1:].split("a"))
    # Random weights reach both ends of their range in some pair of neighbours.
    used = select(target).for_sums((1 << activation_bits) - 1, 1 << weight_bits)
    peak = measured_peak(used, target)
    rows = []
    for layer in NETWORKS[network]:
        found = measure(layer, weight_bits, 1, target, 1, activation_bits)
        rate = found["operations"] / found["seconds"]
        row = {"variant": variant, "precision": precision, "network": network, "layer": layer.name}
        row |= {"count": layer.count, "kernel": found["variant"], "us": round(1e6 * found["seconds"], 1)}
        row |= {"operations": found["operations"], "GOPs": round(rate / 1e9), "peak_GOPs": round(peak / 1e9)}
        rows.append(row | {"of_peak": f"{rate / peak:.0%}"})
    return rows


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for all layers."""
    us = sum(row["count"] * row["us"] for row in rows)
    operations = sum(row["count"] * row["operations"] for row in rows)
    peak, before = rows[0]["peak_GOPs"], [row.get("before_us") for row in rows]
    result = {name: rows[0][name] for name in ("variant", "precision", "network")}
    result |= {"kernel": rows[-1]["kernel"], "ms": round(us / 1e3, 2), "GOPs": round(operations / us / 1e3)}
    result |= {"peak_GOPs": peak, "of_peak": f"{operations / us / 1e3 / peak:.0%}"}
    if None not in before:
        result["before_ms"] = round(sum(row["count"] * row["before_us"] for row in rows) / 1e3, 2)
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=list(PORTABLE), default=list(PORTABLE))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["ResNet-18"])
    parser.add_argument("--before", type=Path, help="rows of the layers of an older run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if os.environ.get("TVM_NUM_THREADS") != "1":
        os.environ["TVM_NUM_THREADS"] = "1"
        os.execv(
            sys.executable, [sys.executable, "-m", "benchmarks.instruction_sets", *(argv or sys.argv[1:])]
        )
    known = ("variant", "precision", "network", "layer")
    older = json.loads(options.before.read_text())["rows"] if options.before else []
    before = {tuple(row[name] for name in known): row["us"] for row in older}
    available = cpu_features() or frozenset()
    layers, sums = [], []
    for variant in options.variants:
        (target,) = resolve(variant).values()
        if not set(required_features(target)) <= available:
            print(f"{variant}: not on this processor")
            continue
        for network in options.networks:
            for precision in options.precisions:
                rows = _timed(variant, precision, network)
                for row in rows:
                    if (us := before.get(tuple(row[name] for name in known))) is not None:
                        row["before_us"] = us
                layers += rows
                sums.append(_sum(rows))
                print(sums[-1], flush=True)
                if options.out:
                    about = {"machine": machine()}
                    options.out.write_text(json.dumps({**about, "rows": sums}, indent=1) + "\n")
                    layers_path(options.out).write_text(
                        json.dumps({**about, "rows": layers}, indent=1) + "\n"
                    )


if __name__ == "__main__":
    main()
