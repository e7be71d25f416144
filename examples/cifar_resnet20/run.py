"""CIFAR-10 ResNet-20 at two bits: quantize, correct, compile, and score the library on 4000 test images.

``python -m examples.cifar_resnet20.run [--data FOLDER] [--recipe FILE] [--output FOLDER]`` leaves the bundle, the library and ``results.json``
in the output folder.  The data folder holds ``cifar10/`` with ``resnet20.safetensors``, ``calibration.npz`` and
``evaluation.npz``, as benchmarks/README.md describes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("LOGLEVEL", "ERROR")  # Neural Compressor's: its own lines would tear the progress bars

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cat_plugin
import tvm_backend
from benchmarks.machine import machine
from benchmarks.models import DATA_ROOT, Split, cifar10, resnet20, top1

HERE = Path(__file__).resolve().parent
SAMPLES = 1024
FILES = ("resnet20.safetensors", "calibration.npz", "evaluation.npz")


def missing(data: Path) -> list[Path]:
    """The files that the example needs and that are not there."""
    return [data / "cifar10" / name for name in FILES if not (data / "cifar10" / name).is_file()]


def library_top1(library: Path, images: Tensor, labels: Tensor) -> float:
    """Top-1 of a compiled library in percent, run in a process that never imports PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "images.npz", Path(folder) / "result.npz"
        np.savez(source, images=images.numpy())
        script = HERE.parent / "digits" / "deploy.py"
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}  # where nothing is installed
        command = [sys.executable, str(script), str(library), str(source), str(result)]
        subprocess.run(command, check=True, env=environment)
        with np.load(result) as arrays:
            return float((arrays["logits"].argmax(1) == labels.numpy()).mean()) * 100


def quantize(network: nn.Module, split: Split, path: Path, console: Console) -> cat_plugin.Recipe:
    """Run the recipe: calibrated on the first 1024 images without labels, scored on the next 1024 with them."""
    recipe = cat_plugin.load_recipe(path)
    images, labels = split.calibration[SAMPLES : 2 * SAMPLES], split.calibration_labels[SAMPLES : 2 * SAMPLES]
    with console.status("quantizing") as status:
        recipe.run(
            network,
            calibration=split.batches(64, SAMPLES),
            eval_fn=lambda model: top1(model, images, labels) / 100,
            progress=lambda trial, state: status.update(f"{trial}: {state.stage}, {state.fraction:.0%}"),
        )
    return recipe


def measure(trial: Any, split: Split, output: Path) -> dict[str, Any]:
    """Bundle and compile the model of one trial; every number of its row."""
    name = f"W{trial.config['w_bits']}A{trial.config['a_bits']} {trial.config['preset']}"
    test = split.evaluation, split.evaluation_labels
    folder = output / name.lower().replace(" ", "-")
    bundle = cat_plugin.export_bundle(trial.model, split.evaluation[:5], folder / "bundle")
    tvm_backend.compile(bundle, target="native", out=folder / "model.so")
    layers = json.loads((bundle / "manifest.json").read_text())["layers"]
    return {
        "name": name,
        "tuning_score": 100 * trial.score,
        "quantized": top1(trial.model.model, *test),
        "corrected": top1(trial.model, *test),
        "library": library_top1(folder / "model.so", *test),
        "weights_kib": sum(math.prod(layer["weight_shape"]) * layer["w_bits"] for layer in layers) / 8192,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One row for the float model and each trial; what a row does not have stays empty."""
    table = Table(title="ResNet-20 on CIFAR-10: top-1 in % of 4000 test images")
    for heading in ("", "model", "+ CAT", "library", "weights, KiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        scores = (f"{row[key]:.2f}" if key in row else "" for key in ("quantized", "corrected", "library"))
        table.add_row(row["name"], *scores, f"{row['weights_kib']:.0f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA_ROOT, help="folder that holds cifar10/")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml", help="what to try")
    parser.add_argument("--output", type=Path, default=Path("cifar-output"), help="where the results go")
    options = parser.parse_args(arguments)
    if absent := missing(options.data.resolve()):
        names = "\n  ".join(str(path) for path in absent)
        print(
            f"the example needs files that are not there:\n  {names}\ngive their folder with --data",
            file=sys.stderr,
        )
        return 2
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    console = Console()

    network, split = resnet20(options.data), cifar10(options.data)
    rows: list[dict[str, Any]] = [
        {
            "name": "FP32",
            "quantized": top1(network, split.evaluation, split.evaluation_labels),
            "weights_kib": sum(weight.numel() for weight in network.parameters() if weight.ndim > 1) / 256,
        }
    ]
    for trial in quantize(network, split, options.recipe, console).trials:
        with console.status("compiling and scoring"):
            rows.append(measure(trial, split, output))
    console.print(table_of(rows))
    (output / "results.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    console.print(f"bundles, libraries and results.json are in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
