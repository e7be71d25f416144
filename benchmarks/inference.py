"""Whole models compiled to a library, beside ONNX Runtime, OpenVINO and PyTorch: one command, one table.

Every library of ours and every peer runs in a process of its own, the peers in environments of their own
(:mod:`benchmarks.peers`), all with the same number of threads and waiting threads asleep.  Rows are merged into one JSON as
soon as they are there, so that it can be run in pieces::

    python -m benchmarks.inference
    python -m benchmarks.inference --models resnet20 --ours-only --layers
    python -m benchmarks.inference --models resnet18 --peers-only --peers onnxruntime openvino
    python -m benchmarks.inference --show

Quantizing and compiling take longer than measuring and load the machine.  ``--only prepare`` does that part alone and
keeps the result in the cache, ``--only measure`` takes it from there::

    python -m benchmarks.inference --only prepare
    python -m benchmarks.inference --only measure --seconds 1

``--isa avx2`` compiles ours for processors that have no more than that, and caps oneDNN alike (``ONEDNN_MAX_CPU_ISA``), with which
OpenVINO and PyTorch compute.  ONNX Runtime has no such switch: its rows are those of the whole processor.

``w8a8 free`` and ``w8a8 fours`` have ``bounded_sums: null`` and ``fours``, which matters to processors without VNNI alone.

``vs ORT int8`` and ``vs OpenVINO int8`` are their milliseconds over the row's: above 1 the row is faster.  ``load`` is the
machine's load average when the row was measured; ratios of rows with different loads say little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.models import MODELS
from benchmarks.peers.environments import CACHE, CHECKOUT, PEERS, run_peer
from benchmarks.tables import table

__all__ = ["main", "merged", "with_ratios"]

OUT = CHECKOUT / "docs" / "benchmarks" / "inference.json"
PRECISIONS = ("w8a8", "w8a8 fours", "w8a8 free", "w4a4", "w2a2")
ISAS = {
    "native": None,
    "amx_int8": "AVX512_CORE_AMX",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx512bw": "AVX512_CORE",
    "avx_vnni": "AVX2_VNNI",
    "avx2": "AVX2",
}
"""Instruction sets that ours are compiled for, and what caps oneDNN, which OpenVINO and PyTorch compute with, alike."""
COLUMNS = [
    "isa", "model", "batch", "peer", "precision", "ms", "ms_p10", "vs_ort_int8", "vs_openvino_int8", "error", "load"
]  # fmt: skip
OURS = [
    "model", "batch", "precision", "weight_bytes", "weights_smaller", "affine_us", "affine_percent", "compile_seconds",
    "float_ops",
]  # fmt: skip
LAYERS = [
    "model", "batch", "precision", "layer", "output", "us", "operations", "bytes", "gops", "of_peak", "of_floor",
]  # fmt: skip
_REFERENCES = {"vs_ort_int8": ("onnxruntime", "int8"), "vs_openvino_int8": ("openvino", "int8")}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("model", "batch", "peer", "precision", "number", "isa"))


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of which newer ones replace older ones about the same thing, sorted by model, batch and peer.

    Parameters
    ----------
    old, new
        Rows with ``model``, ``batch``, ``peer`` and ``precision``.

    Returns
    -------
    list of dict
        New rows; the arguments stay as they are.
    """
    rows = {_key(row): row for row in old} | {_key(row): row for row in new}
    names = list(MODELS)

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        model = row.get("model")
        ours = row.get("peer") not in (None, "cat-ptq")
        return (
            names.index(model) if model in names else len(names),
            row.get("batch") or 0,
            ours,
            row.get("number", 0),
        )

    return sorted(rows.values(), key=order)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the milliseconds of the int8 peers on the same model and batch over their own."""
    times = {_key(row): row["ms"] for row in rows if "ms" in row}
    result = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in _REFERENCES}
        for name, (peer, precision) in _REFERENCES.items():
            other = times.get((row.get("model"), row.get("batch"), peer, precision, None, row.get("isa")))
            if other is not None and "ms" in row:
                row[name] = round(other / row["ms"], 2)
        result.append(row)
    return result


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"machine": machine(), "rows": []}


def _of(rows: list[dict[str, Any]], isa: str) -> list[dict[str, Any]]:
    """Rows that say for which instruction set they are, unless it is the processor's own."""
    return rows if isa == "native" else [{**row, "isa": isa} for row in rows]


def _merge_into(path: Path, rows: list[dict[str, Any]], measured_on: dict[str, Any] | None) -> None:
    data = _read(path)
    data["machine"] = measured_on or data["machine"]
    data["rows"] = with_ratios(merged(data["rows"], rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    staged.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(staged, path)


def ours(model: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare and measure one model at one precision, each in a process of its own; a failure becomes a row."""
    threads = str(options.threads)
    variables = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": threads,
        "TVM_NUM_THREADS": threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        common = ["--model", model, "--precision", precision, "--threads", threads, "--out", str(out)]
        common += ["--cache", str(options.cache.resolve()), "--seconds", str(options.seconds)]
        common += ["--data", options.data] if options.data else []
        common += ["--layers"] if options.layers else []
        common += ["--batches", *map(str, options.batches), "--isa", options.isa]
        for what in (options.only,) if options.only else ("prepare", "measure"):
            command = [sys.executable, "-m", "benchmarks.inference_ours", what, *common]
            done = subprocess.run(
                command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, check=False
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                about = {"peer": "cat-ptq", "model": model, "precision": precision}
                reason = f"{what}: {lines[-1][:300]}"
                return {"rows": [{**about, "batch": batch, "reason": reason} for batch in options.batches]}
        return {"rows": []} if options.only == "prepare" else dict(json.loads(out.read_text()))


def peer(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a peer on the models asked for."""
    arguments = ["--models", *options.models, "--batches", *map(str, options.batches)]
    arguments += ["--seconds", str(0 if options.only == "prepare" else options.seconds)]
    arguments += ["--kept", str(options.cache.resolve() / "models")]
    arguments += ["--data", options.data] if options.data else []
    load = machine()["load"]
    if cap := ISAS[options.isa]:
        os.environ["ONEDNN_MAX_CPU_ISA"] = cap
    result = run_peer(name, "speed", arguments, cache=options.cache, threads=options.threads)
    if options.only == "prepare":
        failed = [row for row in result["rows"] if "reason" in row]
        for row in failed:
            print(f"{name}: {row['reason']}", file=sys.stderr)
        return {"rows": []}
    result["rows"] = [{"load": load, **row} for row in result["rows"]]
    return result


def _show(out: Path, chosen: argparse.Namespace) -> None:
    def asked(row: dict[str, Any]) -> bool:
        return row.get("model") in (None, *chosen.models) and row.get("batch") in (None, *chosen.batches)

    rows = [row for row in _read(out)["rows"] if asked(row)]
    print(table(rows, COLUMNS))
    print("\n" + table([row for row in rows if row.get("peer") == "cat-ptq"], OURS))
    if chosen.layers:
        print("\n" + table([row for row in _read(_layers_path(out))["rows"] if asked(row)], LAYERS))


def _layers_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_layers.json")


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for, merge it and print the tables."""
    speed = [name for name, entry in PEERS.items() if "speed" in entry.kinds]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of ours"
    )
    parser.add_argument("--peers", nargs="+", choices=speed, default=speed)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ours-only", action="store_true")
    which.add_argument("--peers-only", action="store_true")
    which.add_argument("--show", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--only", choices=("prepare", "measure"), help="one of the two steps")
    parser.add_argument("--layers", action="store_true", help="time each layer of ours, too")
    parser.add_argument(
        "--isa",
        choices=list(ISAS),
        default="native",
        help="instruction set of ours, and of peers that can be capped",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="timed seconds a row (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="of environments and models (%(default)s)")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into (%(default)s)")
    options = parser.parse_args(argv)
    if not (options.peers_only or options.show):
        for model in options.models:
            for precision in options.precisions:
                print(f"{model} {precision} ...", file=sys.stderr, flush=True)
                result = ours(model, precision, options)
                _merge_into(options.out, _of(result["rows"], options.isa), result.get("machine"))
                if result.get("layers"):
                    rows = _of(result["layers"], options.isa)
                    _merge_into(_layers_path(options.out), rows, result.get("machine"))
    if not (options.ours_only or options.show):
        for name in options.peers:
            print(f"{name} ...", file=sys.stderr, flush=True)
            result = peer(name, options)
            _merge_into(options.out, _of(result["rows"], options.isa), result.get("machine"))
    if options.only != "prepare":
        _show(options.out, options)


if __name__ == "__main__":
    main()
