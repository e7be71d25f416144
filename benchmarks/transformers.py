"""Accuracy of transformers at low bits: vision transformer and sentence encoder by top-1.

A language model's perplexity has a script of its own, which ``--model smollm2`` calls (:mod:`benchmarks.language_model`).

Rows are measured in the order of their importance, each merged into one JSON as soon as it is there::

    python -m benchmarks.transformers --model vit_s --device cuda
    python -m benchmarks.transformers --rows 'vit_s/w4a4/*' --calibration 64 --evaluation 200

Rows are named ``model/bits/method``: the methods are those of ``METHODS``, and ``w4`` alone means that activations stay in
float.  Attention is quantized at the activations' bits.  Inputs used are in the JSON; labels are used for the number that is
printed, and for nothing else.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.bits import parse_bits

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "transformers.json"
RTN: dict[str, Any] = {"compensation": False, "refit": False, "bias_correction": False}
TRAINED: dict[str, Any] = {
    "preset": "balanced",
    "smoothing": "searched",
    "rotation": "online",
    "loss": "curvature",
    "unit_steps": 60,
    "refinement_steps": 0,
}
WHOLE: dict[str, Any] = {"preset": "best", "smoothing": "searched", "unit_steps": 0, "refinement_steps": 0}
#: Options of each method; the preset is ``fast`` where nothing else is said.
METHODS: dict[str, dict[str, Any]] = {
    "fast+searched": {"smoothing": "searched"},
    "trained": TRAINED,
    "whole model, 300 steps": {**WHOLE, "model_steps": 300},
    "fast": {},
    "fast+online": {"rotation": "online"},
    "fast+folded": {"rotation": "folded"},
    "fast+searched+online": {"smoothing": "searched", "rotation": "online"},
    "fast+searched+folded": {"smoothing": "searched", "rotation": "folded"},
    "fast+searched, positions alike": {"smoothing": "searched", "position_weights": False},
    "fast+searched, uniform softmax": {"smoothing": "searched", "softmax_grid": "uniform"},
    "fast+searched, attention 8": {"smoothing": "searched", "attention_bits": 8},
    "trained, errors alike": {**TRAINED, "loss": "mse"},
    "trained, whole model": {**TRAINED, "model_steps": 400},
    "fast+repq": {"smoothing": "repq"},
    "fast+lrquant": {"smoothing": "lrquant"},
    "fast+smoothquant": {"smoothing": "smoothquant"},
    "rtn": RTN,
    "rtn+online": {**RTN, "rotation": "online"},
    "rtn+folded": {**RTN, "rotation": "folded"},
    "rtn+searched": {**RTN, "smoothing": "searched"},
    "rtn+repq": {**RTN, "smoothing": "repq"},
    "rtn+lrquant": {**RTN, "smoothing": "lrquant"},
    "rtn+smoothquant": {**RTN, "smoothing": "smoothquant"},
    "rtn+lrquant trained": {**RTN, "smoothing": "lrquant", "smoothing_epochs": 5},
}
BITS = {
    "vit_s": ("w4a4", "w3a4", "w6a6", "w8a8"),
    "minilm": ("w8a8", "w4a8", "w4a4"),
}
_FIRST = ("fast+searched+online", "trained", "fast+searched")  # of every bit-width, before any other method


def all_rows() -> list[str]:
    """Names of the rows that there are, the most important first."""
    first = [f"{model}/{bits}/{name}" for model in BITS for name in _FIRST for bits in BITS[model]]
    rest = [name for name in METHODS if name not in _FIRST]
    return first + [f"{model}/{bits}/{name}" for model in BITS for bits in BITS[model] for name in rest]


def _options(bits: str, method: str) -> dict[str, Any]:
    """Keywords of the specification."""
    weights, _, activations = parse_bits(bits)
    options: dict[str, Any] = {"w_bits": weights, "preset": "fast"}
    if activations is None:
        return options | {"weight_only": True} | METHODS[method]
    return options | {"a_bits": activations, "attention_bits": activations} | METHODS[method]


def measure(name: str, case: Any, full: float, memory_mb: int | None = None) -> dict[str, Any]:
    """One row; how far it is goes to the standard error."""
    import torch

    from cat_plugin.ptq import QuantSpec, quantize

    model, bits, method = name.split("/")
    device = next(case.model.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    options = {"batch_size": 32, "memory_mb": memory_mb, **case.options, **_options(bits, method)}
    spec = QuantSpec(num_samples=case.counts["calibration"], **options)
    started = time.perf_counter()
    module, report = quantize(
        case.model,
        spec,
        case.calibration,
        progress=lambda at: print(f"{at.stage} {at.fraction:.0%}", file=sys.stderr, flush=True),
    )
    seconds = time.perf_counter() - started
    row = {"row": name, "model": model, "bits": bits.upper(), "method": method}
    return {
        **row,
        "score": case.score(module),
        "fp": full,
        "unit": case.unit,
        **case.counts,
        "seconds": round(seconds, 1),
        "units": [
            [unit.name, round(unit.loss_before, 5), round(unit.loss_after, 5)] for unit in report.units
        ],
        "notes": report.notes,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Command line."""
    if "smollm2" in sys.argv:
        from benchmarks import language_model

        language_model.main([each for each in sys.argv[1:] if each not in ("--model", "smollm2")])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(BITS), help="rows of one model (default: of all)")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="patterns of row names (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibration", type=int, default=256, help="images or sentences")
    parser.add_argument("--evaluation", type=int, default=1000, help="images or sentences")
    parser.add_argument("--memory-mb", type=int, help="of activations that are kept (default: all of them)")
    parser.add_argument("--jobs", type=int, help="rows measured at a time (default: 6 on a GPU, else 1)")
    parser.add_argument("--minutes", type=float, help="no row is begun after so many")
    options = parser.parse_args()
    patterns = [*options.rows]
    names = [row for row in all_rows() if any(fnmatch.fnmatchcase(row, p) for p in patterns)]
    names = [row for row in names if options.model in (None, row.split("/")[0])]
    if options.list or not names:
        print("\n".join(all_rows()))
        return
    options.jobs = options.jobs or (1 if options.device == "cpu" else 6)
    if options.jobs > 1 and len(names) > 1:
        rows.side_by_side(
            names,
            lambda name, part: _command(name, part, options),
            lambda measured: rows.merge(options.out, measured, all_rows()),
            options.jobs,
            options.minutes,
        )
    else:
        _one_by_one(names, options)


def _one_by_one(names: Sequence[str], options: argparse.Namespace) -> None:
    """Measure rows in this process, where models are loaded once."""
    import torch

    from benchmarks.transformer_models import CASES, Case

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    cases: dict[str, tuple[Case, float]] = {}
    for name in names:
        if options.minutes is not None and time.perf_counter() - started > 60 * options.minutes:
            break
        model = name.split("/")[0]
        try:
            if model not in cases:
                counts = (options.calibration, options.evaluation)
                case = CASES[model](options.data, *counts, torch.device(options.device))
                cases[model] = case, case.score(case.model)
            row = measure(name, *cases[model], options.memory_mb)
        except Exception:  # the other rows are worth having
            print(f"{name}: failed", file=sys.stderr)
            traceback.print_exc()
            continue
        rows.merge(options.out, [row], all_rows())
        print("  ".join(f"{k} {row[k]}" for k in ("row", "score", "fp", "seconds", "load")), flush=True)


def _command(name: str, part: Path, options: argparse.Namespace) -> list[str]:
    """What measures a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.transformers", "--rows", name, "--out", str(part)]
    for key in ("device", "threads", "calibration", "evaluation"):
        command += [f"--{key}", str(getattr(options, key))]
    return command + (["--data", options.data] if options.data else [])


if __name__ == "__main__":
    main()
