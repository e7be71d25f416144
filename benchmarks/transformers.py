"""Accuracy of transformers at low bits: a vision transformer by top-1, a language model by perplexity.

Every row is measured in a process of its own and merged into one JSON as soon as it is there::

    python -m benchmarks.transformers --rows 'vit_s/w4a4/*' --threads 1
    python -m benchmarks.transformers --rows 'smollm2/*'

Rows are named ``model/bits/method``: the methods are those of ``METHODS``, and ``w4`` alone means that activations stay in
float.  Attention is quantized at the activations' bits.  Images, windows and rows used are in the JSON; labels are used for
the number that is printed, and for nothing else.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.models import data_root

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "transformers.json"
RTN: dict[str, Any] = {"compensation": False, "refit": False, "bias_correction": False}
#: Options of each method, all of the preset ``fast``.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": RTN,
    "rtn+smoothquant": {**RTN, "smoothing": "smoothquant"},
    "rtn+repq": {**RTN, "smoothing": "repq"},
    "rtn+lrquant": {**RTN, "smoothing": "lrquant"},
    "rtn+lrquant trained": {**RTN, "smoothing": "lrquant", "smoothing_epochs": 5},
    "fast": {},
    "fast+smoothquant": {"smoothing": "smoothquant"},
    "fast+repq": {"smoothing": "repq"},
    "fast+lrquant": {"smoothing": "lrquant"},
}
BITS = {"vit_s": ("w8a8", "w6a6", "w4a4"), "smollm2": ("w8a8", "w4a8", "w4", "w3")}
_LENGTH = 1024  # tokens of a window


def all_rows() -> list[str]:
    """Names of the rows that there are, in the order of the table."""
    return [f"{model}/{bits}/{method}" for model in BITS for bits in BITS[model] for method in METHODS]


def _options(bits: str, method: str) -> dict[str, Any]:
    """Keywords of the specification."""
    weights, _, activations = bits[1:].partition("a")
    options: dict[str, Any] = {"w_bits": int(weights), "preset": "fast", **METHODS[method]}
    if not activations:
        return options | {"weight_only": True}
    return options | {"a_bits": int(activations), "attention_bits": int(activations)}


def _module(folder: Path, name: str) -> Any:
    """A module that lies beside the weights."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def _images(folder: Path, count: int, mean: Any, std: Any) -> tuple[Any, list[int]]:
    """(count, 3, 224, 224) images, every n-th so that all classes are there, and their classes."""
    import csv

    import numpy as np
    import torch
    from PIL import Image

    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))[:count]
    pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB"), np.float32) for row in rows]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    shape = (1, 3, 1, 1)
    normalised = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return normalised.contiguous(), [int(row["class_index"]) for row in rows]


def vit_s(bits: str, method: str, data: str | None, calibration: int, evaluation: int) -> dict[str, Any]:
    """Top-1 of the 10 classes of Imagenette."""
    import torch

    from cat_plugin.ptq import QuantSpec, quantize

    root = data_root(data)
    source = _module(root / "vit_s", "vit_s")
    model = source.vit_s()
    x, _ = _images(root / "imagenette" / "calibration", calibration, source.MEAN, source.STD)
    spec = QuantSpec(num_samples=calibration, batch_size=16, **_options(bits, method))
    started = time.perf_counter()
    module, report = quantize(model, spec, x.split(16))
    seconds = time.perf_counter() - started
    images, classes = _images(root / "imagenette" / "evaluation", evaluation, source.MEAN, source.STD)
    labels = torch.tensor([source.CLASSES.index(c) for c in classes])

    def right(network: Any) -> float:
        with torch.no_grad():
            logits = torch.cat([network(part) for part in images.split(20)])
        return round(100.0 * float((logits.argmax(1) == labels).double().mean()), 2)

    return {
        "score": right(module),
        "fp": right(model),
        "unit": "top-1",
        "calibration": calibration,
        "evaluation": evaluation,
        "seconds": round(seconds, 1),
        "notes": report.notes,
    }


def smollm2(bits: str, method: str, data: str | None, calibration: int, evaluation: int) -> dict[str, Any]:
    """Perplexity on windows of WikiText-2's test text, calibrated on windows of its validation text."""
    import torch

    from cat_plugin import perplexity
    from cat_plugin.ptq import QuantSpec, quantize

    folder = data_root(data) / "smollm2"
    model, tokenizer = _module(folder, "load_smollm2").load_smollm2()

    def windows(name: str, count: int) -> Any:
        text = (folder / name).read_text()[: 8 * count * _LENGTH]
        return torch.tensor(tokenizer.encode(text).ids)[: count * _LENGTH].view(count, _LENGTH)

    spec = QuantSpec(num_samples=calibration, batch_size=1, first_bits=None, **_options(bits, method))
    started = time.perf_counter()
    module, report = quantize(model, spec, windows("wikitext2_valid.txt", calibration))
    seconds = time.perf_counter() - started
    test = windows("wikitext2_test.txt", evaluation)
    return {
        "score": round(perplexity(module, test), 3),
        "fp": round(perplexity(model, test), 3),
        "unit": "perplexity",
        "calibration": calibration,
        "evaluation": evaluation,
        "seconds": round(seconds, 1),
        "notes": report.notes,
    }


def measure(name: str, data: str | None, threads: int, counts: tuple[int, int]) -> dict[str, Any]:
    """One row; runs in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    model, bits, method = name.split("/")
    measured = {"vit_s": vit_s, "smollm2": smollm2}[model](bits, method, data, *counts)
    load = round(os.getloadavg()[0], 2)
    row = {"row": name, "model": model, "bits": bits.upper(), "method": method}
    return {**row, **measured, "threads": threads, "load": load}


def merge(path: Path, row: dict[str, Any]) -> None:
    """Replace the row of that name in the JSON."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    order = {name: i for i, name in enumerate(all_rows())}
    rows = [other for other in known if other["row"] != row["row"]] + [row]
    rows.sort(key=lambda each: order.get(each["row"], len(order)))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    staged.write_text(
        json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=1) + "\n"
    )
    os.replace(staged, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="patterns of row names (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibration", type=int, default=128, help="images, or windows of tokens")
    parser.add_argument("--evaluation", type=int, default=400, help="images, or windows of tokens")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = (options.calibration, options.evaluation)
    if options.one:
        print(json.dumps(measure(options.one, options.data, options.threads, counts)))
        return
    names = [row for row in all_rows() if any(fnmatch.fnmatchcase(row, p) for p in options.rows)]
    if options.list or not names:
        print("\n".join(all_rows()))
        return
    for name in names:
        command = [sys.executable, "-m", "benchmarks.transformers", "--one", name]
        command += ["--threads", str(options.threads)]
        command += ["--calibration", str(options.calibration), "--evaluation", str(options.evaluation)]
        command += ["--data", options.data] if options.data else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
        if finished.returncode:
            print(f"{name}: failed with exit code {finished.returncode}", file=sys.stderr)
            continue
        row = json.loads(finished.stdout.strip().splitlines()[-1])
        merge(options.out, row)
        print("  ".join(f"{k} {row[k]}" for k in ("row", "score", "fp", "seconds", "load")), flush=True)


if __name__ == "__main__":
    main()
