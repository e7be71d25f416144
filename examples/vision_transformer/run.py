"""A vision transformer down to 4 bits, attention included, and compiled: everything comes from packages, nothing is downloaded.

``python -m examples.vision_transformer.run [--epochs N] [--output FOLDER]`` trains the network from its seed (a minute on one
core), quantizes it, compiles the 4-bit one and leaves ``results.json`` and the library in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cat_plugin import export_bundle
from cat_plugin.ptq import QuantSpec, quantize
from examples.vision_transformer.model import load_images, train

FAST: dict[str, Any] = {"preset": "fast", "smoothing": "searched"}
ROWS: dict[str, dict[str, Any]] = {
    "W8A8": {**FAST, "w_bits": 8, "a_bits": 8},
    "W4A4, rounded to nearest": {
        "preset": "fast", "w_bits": 4, "a_bits": 4, "attention_bits": 4, "softmax_grid": "uniform",
        "compensation": False, "bias_correction": False,
    },
    "W4A4": {**FAST, "w_bits": 4, "a_bits": 4, "attention_bits": 4},
    "W4A4, trained": {
        **FAST, "preset": "balanced", "loss": "curvature", "w_bits": 4, "a_bits": 4, "attention_bits": 4,
    },
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output", type=Path, default=Path("vision_transformer"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    console, split = Console(), load_images()
    with console.status("training"):
        network = train(split, epochs=options.epochs)
    images, labels = split.test

    def top1(model: Callable[[torch.Tensor], Any]) -> float:
        with torch.no_grad():
            found = [np.asarray(model(part)).argmax(1) for part in images.split(100)]
        return round(100 * float((np.concatenate(found) == labels.numpy()).mean()), 2)

    rows = [{"name": "FP32", "top1": top1(network)}]
    for name in options.rows:
        with console.status(name):
            module, _ = quantize(network, QuantSpec(**ROWS[name]), split.calibration[0].split(64))
        rows.append({"name": name, "top1": top1(module)})
    try:
        import tvm_backend
    except ImportError:
        print("TVM is not installed; nothing is compiled", file=sys.stderr)
    else:
        with console.status("compiling"):
            bundle = export_bundle(module, images[:2], options.output / "bundle")
            tvm_backend.compile(bundle, target="native", out=options.output / "model.so")
        library = tvm_backend.load(options.output / "model.so")
        rows.append({"name": f"{name}, compiled", "top1": top1(lambda part: library(part.numpy()))})
    (options.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("", "top-1", title=f"{len(images)} test images")
    for row in rows:
        table.add_row(str(row["name"]), str(row["top1"]))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
