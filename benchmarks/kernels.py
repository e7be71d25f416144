"""Time every convolution of the benchmark networks by itself and compare it with what the processor can do.

    python -m benchmarks.kernels --threads 1 --batch 1 16 --bits 8 --out kernels.json
    python -m benchmarks.kernels --peer onnxruntime.json     (from benchmarks.kernels_onnxruntime)

The floor of a layer is the larger of its operations over the measured rate of one dot-product instruction with all
operands in registers, and its bytes over the measured bandwidth of copying in the last-level cache.  A layer's time is
the shortest of many runs, because other work on the machine can only lengthen it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from benchmarks.layer_shapes import NETWORKS, Layer
from benchmarks.machine import machine
from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa import Amx, Avx512Vnni, AvxVnni, InstructionSet, NeonDot, select
from tvm_backend.kernels.cpu.sums import Sums
from tvm_backend.kernels.cpu.tiles import TileProduct
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import ConvSpec, Epilogue, QParams
from tvm_backend.processor import permit_amx
from tvm_backend.target import resolve

__all__ = ["main"]

INPUT = QParams(0.02, 0, 0, 255, "uint8")


def best_time(function: Any, arguments: list[Any], repeat: int) -> float:
    """The shortest of many calls, or of the mean of as many as take 50 microseconds, in seconds."""
    one = function.mod.time_evaluator("kernel", tvm.cpu(), number=1, repeat=3)(*arguments).min
    number = max(1, int(50e-6 / one))
    timer = function.mod.time_evaluator("kernel", tvm.cpu(), number=number, repeat=60 * repeat)
    return float(timer(*arguments).min)


def measured_peak(isa: InstructionSet, target: Any) -> float:
    """Operations a second of one core when independent sums take dot products from registers."""
    if isinstance(isa, Amx):
        return _measured_tiles(target)
    if not isinstance(isa, Avx512Vnni | AvxVnni | NeonDot):
        return _measured_sequence(isa, target)
    # Registers for the sums and the two factors.
    rounds, sums = 20_000, 12 if isa.lanes == 8 else 16
    with tir.Function("kernel") as function:
        data, weight, output = function.buffers(
            [
                ("data", (isa.unit,), isa.takes or "uint8"),
                ("weight", (isa.unit,), "int8"),
                ("output", (sums * isa.lanes,), "int32"),
            ]
        )
        held = ir.Registers(sums, "int32", isa.lanes)
        for i in range(sums):
            held[i] = tir.constant(i, "int32", isa.lanes)
        x = isa.activations(data, [0], False)
        with tir.loop(rounds):
            for i in range(sums):
                held[i] = isa.dot(held[i], x, isa.weights(weight, [0]))
        for i in range(sums):
            tir.store(output, held[i], [i * isa.lanes], isa.lanes)
    built = tvm.compile(tvm.IRModule({"kernel": function.result}), target=target)
    arguments = [
        tvm.runtime.tensor(np.ones(isa.unit, isa.takes or "uint8")),
        tvm.runtime.tensor(np.arange(isa.unit).astype(np.int8)),
        tvm.runtime.tensor(np.zeros(sums * isa.lanes, np.int32)),
    ]
    return 2.0 * rounds * sums * isa.unit / best_time(built, arguments, 3)


def _measured_sequence(isa: InstructionSet, target: Any) -> float:
    """The same for sets that take several instructions: a tile's inner loop, with all it reads in the nearest cache."""
    rounds, steps = 400, 64
    vectors, pixels = isa.tiles[0]
    with tir.Function("kernel") as function:
        data, weight, output = function.buffers(
            [
                ("data", (pixels * steps * isa.group,), "int16" if isa.operand == "int16" else "uint8"),
                ("weight", (steps * vectors * isa.unit,), "int8"),
                ("output", (vectors * pixels * isa.lanes,), "int32"),
            ]
        )
        held = Sums(isa, [tir.constant(0, "int32", isa.lanes)] * vectors, pixels)

        def products(step: Any) -> None:
            weights = [
                ir.hold(isa.weights(weight, [(step * vectors + v) * isa.unit]), "int8", isa.unit)
                for v in range(vectors)
            ]
            for p in range(pixels):
                x = isa.activations(data, [(p * steps + step) * isa.group], False)
                for v in range(vectors):
                    held.add(p * vectors + v, x, weights[v])

        with tir.loop(rounds):
            held.loop(steps, products)
        for i in range(vectors * pixels):
            tir.store(output, held[i], [i * isa.lanes], isa.lanes)
    built = tvm.compile(tvm.IRModule({"kernel": function.result}), target=target)
    wide = np.int16 if isa.operand == "int16" else np.uint8
    arguments = [
        tvm.runtime.tensor(np.ones(pixels * steps * isa.group, wide)),
        tvm.runtime.tensor(np.ones(steps * vectors * isa.unit, np.int8)),
        tvm.runtime.tensor(np.zeros(vectors * pixels * isa.lanes, np.int32)),
    ]
    return 2.0 * rounds * steps * vectors * pixels * isa.unit / best_time(built, arguments, 3)


def _measured_tiles(target: Any) -> float:
    """The same for AMX: the four products of a step, with their operands loaded from the nearest cache."""
    if not permit_amx():
        raise SystemExit("this processor or its operating system has no AMX")
    rounds, product = 5_000, TileProduct(16, 64, 2, signed=False)
    (pair,) = product.pairs()
    with tir.Function("kernel") as function:
        data, weight, output = function.buffers(
            [
                ("data", (2048,), "uint8"),
                ("weight", (2048,), "int8"),
                ("output", (product.staged,), "int32"),
            ]
        )
        with product.configured():
            product.clear(pair)
            with tir.loop(rounds):
                product.step(pair, [(data, [0]), (data, [1024])], 64, weight, 0)
            product.store(pair, output)
    built = tvm.compile(tvm.IRModule({"kernel": function.result}), target=target)
    arguments = [
        tvm.runtime.tensor(np.ones(2048, np.uint8)),
        tvm.runtime.tensor(np.ones(2048, np.int8)),
        tvm.runtime.tensor(np.zeros(product.staged, np.int32)),
    ]
    return 2.0 * rounds * 4 * 16 * 16 * 64 / best_time(built, arguments, 3)


def measured_bandwidth() -> float:
    """Bytes a second, read and written, of copying 4 MiB."""
    import time

    source, target = np.ones(4 << 20, np.uint8), np.empty(4 << 20, np.uint8)
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def convolution(layer: Layer, bits: int, batch: int | None, activation_bits: int = 8) -> ConvSpec:
    """The specification of a layer with ReLU and one 8-bit output."""
    given = QParams(INPUT.scale, 0, 0, (1 << activation_bits) - 1, "uint8")
    return ConvSpec(
        batch=batch,
        height=layer.size,
        width=layer.size,
        in_channels=layer.inputs,
        out_channels=layer.outputs,
        kernel=(layer.kernel, layer.kernel),
        input=given,
        epilogue=Epilogue((0.0, None), None, (INPUT,)),
        stride=(layer.stride, layer.stride),
        padding=layer.padding,
        groups=layer.groups,
        weight_bits=bits,
    )


def measure(
    layer: Layer, bits: int, batch: int, target: Any, repeat: int, activation_bits: int = 8
) -> dict[str, Any]:
    """Compile and time one layer with a batch size that is known at run time only."""
    spec = convolution(layer, bits, None, activation_bits)
    rng = np.random.default_rng(0)
    weight = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), spec.weight_shape).astype(np.int8)
    kernel = lower(spec, target, weight)
    built = tvm.compile(
        tvm.IRModule({"kernel": kernel.prim_func.with_attr("global_symbol", "kernel")}), target=target
    )
    packed = kernel.pack_weight(weight)
    arrays = [
        rng.integers(0, 1 << activation_bits, (batch, layer.size, layer.size, layer.inputs)).astype(np.uint8),
        packed,
        kernel.compensation(weight),
        np.full(layer.outputs, 1e-4, np.float32),
        np.zeros(layer.outputs, np.float32),
        kernel.generator.numbers,
        np.zeros((batch, layer.out_size, layer.out_size, layer.outputs), np.uint8),
    ]
    seconds = best_time(built, [tvm.runtime.tensor(array) for array in arrays], repeat)
    moved = arrays[0].nbytes + arrays[-1].nbytes + packed.nbytes
    return {
        "seconds": seconds,
        "operations": 2 * layer.macs * batch,
        "bytes": moved,
        "variant": kernel.variant,
    }


def _readable(row: dict[str, Any], peak: float) -> dict[str, Any]:
    """The figures of a row in the units of a table."""
    rate = row["operations"] / row["seconds"]
    return {
        "us": round(row["seconds"] * 1e6, 1),
        "MOP": round(row["operations"] / 1e6, 2),
        "KB": round(row["bytes"] / 1e3, 1),
        "GOPs": round(rate / 1e9),
        "of_peak": f"{rate / peak:.0%}",
        "of_floor": f"{row['floor_seconds'] / row['seconds']:.0%}",
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--bits", nargs="+", type=int, default=[8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--target", default="native")
    parser.add_argument("--peer", type=Path, help="JSON of a peer's times to print beside ours")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if os.environ.get("TVM_NUM_THREADS") != str(options.threads):
        os.environ["TVM_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.kernels", *(argv or sys.argv[1:])])
    target = next(iter(resolve(options.target).values()))
    isa = select(target)
    peak, bandwidth = measured_peak(isa, target) * options.threads, measured_bandwidth() * options.threads
    print(f"{isa.name}, {options.threads} thread(s): {peak / 1e9:.0f} GOP/s, {bandwidth / 1e9:.0f} GB/s")
    peer = json.loads(options.peer.read_text()) if options.peer else {"rows": []}
    theirs = {(row["layer"], row["batch"]): row["seconds"] for row in peer["rows"]}
    rows = []
    for network in options.networks:
        for batch in options.batch:
            for bits in options.bits:
                print(f"\n{network}, batch {batch}, {bits}-bit weights")
                print(
                    f"{'layer':34}{'x':>3}{'us':>10}{'GOP/s':>8}{'floor us':>10}{'of floor':>9}{'peer us':>10}"
                )
                total = floor_total = peer_total = 0.0
                for layer in NETWORKS[network]:
                    row = measure(layer, bits, batch, target, options.repeat)
                    floor = max(row["operations"] / peak, row["bytes"] / bandwidth)
                    row |= {
                        "network": network,
                        "layer": layer.name,
                        "count": layer.count,
                        "batch": batch,
                        "bits": bits,
                    }
                    row |= {"floor_seconds": floor, "peer_seconds": theirs.get((layer.name, batch))}
                    row |= _readable(row, peak)
                    rows.append(row)
                    total += layer.count * row["seconds"]
                    floor_total += layer.count * floor
                    peer_total += layer.count * (row["peer_seconds"] or float("nan"))
                    beside = f"{row['peer_seconds'] * 1e6:10.1f}" if row["peer_seconds"] else ""
                    print(
                        f"{layer.name:34}{layer.count:3}{row['seconds'] * 1e6:10.1f}"
                        f"{row['operations'] / row['seconds'] / 1e9:8.0f}{floor * 1e6:10.1f}"
                        f"{floor / row['seconds']:9.0%}{beside}"
                    )
                beside = f"{peer_total * 1e6:10.1f}" if peer_total == peer_total else ""
                print(
                    f"{'all convolutions':37}{total * 1e6:10.1f}{'':8}{floor_total * 1e6:10.1f}"
                    f"{floor_total / total:9.0%}{beside}",
                    flush=True,
                )
    if options.out:
        result = {
            "machine": machine(),
            "threads": options.threads,
            "peak": peak,
            "bandwidth": bandwidth,
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
