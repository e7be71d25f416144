"""The whole path on real digits: train, quantize through Neural Compressor, compile, run without PyTorch.

``python examples/digits/run.py [--output demo-output]`` leaves ``results.json``, ``results.png`` and, for
each bit-width, a bundle and a compiled library in the output directory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("LOGLEVEL", "ERROR")  # Neural Compressor's: its own lines would tear the progress bars

import numpy as np
import torch
from model import DigitsResNet, Split, load_split, rounded, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import cat_plugin
import tvm_backend

HERE = Path(__file__).resolve().parent
BATCH = 64


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Run `model` over `images` (n, 1, 8, 8); (n, 10) float32."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def top1(logits: Tensor | np.ndarray, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return float((np.asarray(logits).argmax(1) == labels.numpy()).mean() * 100)


def latency_of(model: nn.Module, images: Tensor, seconds: float = 1.0) -> float:
    """Median time of one PyTorch call in microseconds per image."""
    times: list[float] = []
    with torch.no_grad():
        for _ in range(5):
            model(images)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 10:
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return float(np.median(times)) / len(images) * 1e6


def train_network(console: Console, split: Split, epochs: int) -> DigitsResNet:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train (epochs)", total=epochs)
        return train(split, epochs=epochs, progress=lambda: bar.advance(task))


def deploy(library: Path, images: Tensor, output: Path) -> dict[str, Any]:
    """Run the compiled library over `images` in a process of its own that never imports PyTorch."""
    source, result = output / "test_images.npz", output / "deployed.npz"
    np.savez(source, images=images.numpy())
    subprocess.run(
        [sys.executable, str(HERE / "deploy.py"), str(library), str(source), str(result)],
        check=True,
    )
    with np.load(result) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    source.unlink()
    result.unlink()
    return found


def measure(name: str, model: nn.Module, split: Split, output: Path, console: Console) -> dict[str, Any]:
    """Export, compile and run one corrected model; every number of its row."""
    images, labels = split.test
    corrected = logits_of(model, images)
    with console.status(f"{name}: writing the bundle and compiling"):
        bundle = cat_plugin.export_bundle(
            model,
            images[:5],
            output / name.lower() / "bundle",
            calibration={"samples": len(split.calibration[0]), "source": "scikit-learn digits"},
        )
        start = time.perf_counter()
        library = output / name.lower() / "model.so"
        tvm_backend.compile(bundle, target="native", out=library)
        compile_seconds = time.perf_counter() - start
    with console.status(f"{name}: running the library without PyTorch"):
        deployed = deploy(library, images, output)
    from_library = deployed["logits"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    differing = np.flatnonzero(from_library.argmax(1) != corrected.numpy().argmax(1))
    return {
        "name": name,
        "quantized_top1": top1(logits_of(model.model, images), labels),
        "corrected_top1": top1(corrected, labels),
        "library_top1": top1(from_library, labels),
        "library_differs_on": differing.tolist(),
        "largest_logit_difference": float(np.abs(from_library - corrected.numpy()).max()),
        "weight_bytes": sum(
            -(-int(np.prod(layer["weight_shape"])) * (layer["w_bits"] or 32) // 8)
            for layer in manifest["layers"]
        ),
        "bundle_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "library_bytes": library.stat().st_size,
        "compile_seconds": compile_seconds,
        "torch_us": latency_of(model, images[:1]),
        "library_us": float(deployed["latency_1"]),
        "library_us_batch64": float(deployed["latency_64"]),
    }


def elsewhere(network: nn.Module, split: Split, bits: int) -> dict[str, Any]:
    """A network that somebody else rounded, before and after a correction is fitted to unlabelled images."""
    images, labels = split.test
    rough = rounded(network, bits)
    repaired = cat_plugin.correct(rough, network, split.calibration[0].split(BATCH))
    return {
        "name": f"W{bits} RTN",
        "quantized_top1": top1(logits_of(rough, images), labels),
        "corrected_top1": top1(logits_of(repaired, images), labels),
    }


def trial_table(recipe: cat_plugin.Recipe) -> Table:
    """What Neural Compressor tried, and what came of it."""
    table = Table(title="Trials of Neural Compressor's autotune, scored on the tuning split")
    for heading in ("configuration", "top-1 %", "criterion", "seconds"):
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    table.add_row("full precision", f"{100 * (recipe.baseline or 0):.2f}", "", "")
    for trial in recipe.trials:
        name = f"W{trial.config['w_bits']}A{trial.config['a_bits']}, {trial.config['preset']}"
        table.add_row(
            name, f"{100 * trial.score:.2f}", "met" if trial.met else "missed", f"{trial.seconds:.1f}"
        )
    return table


def table_of(fp: dict[str, Any], rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> Table:
    """One row of results for the full-precision network and each bit-width."""
    table = Table(title="600 test images; top-1 in %, sizes in KiB, microseconds per image")
    for heading in ("", "top-1", "+CAT", "library", "diff", "weights", ".so", "n = 1", "n = 64"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row(
        "FP32", f"{fp['top1']:.2f}", "", "", "", f"{fp['weight_bytes'] / 1024:.0f}", "",
        f"{fp['torch_us']:.0f}", f"{fp['torch_us_batch64']:.0f}",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["name"], f"{row['quantized_top1']:.2f}", f"{row['corrected_top1']:.2f}",
            f"{row['library_top1']:.2f}", f"{row['largest_logit_difference']:.0e}",
            f"{row['weight_bytes'] / 1024:.0f}", f"{row['library_bytes'] / 1024:.0f}",
            f"{row['library_us']:.0f}", f"{row['library_us_batch64']:.0f}",
        )  # fmt: skip
    for row in others:
        table.add_row(row["name"], f"{row['quantized_top1']:.2f}", f"{row['corrected_top1']:.2f}", *[""] * 6)
    return table


def chart(fp: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy before and after the correction, and weight size, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), width_ratios=(2, 1), layout="constrained")
    places = np.arange(len(rows))
    for offset, key, label, color in (
        (-0.26, "quantized_top1", "quantized", "#9aa5b1"),
        (0.0, "corrected_top1", "quantized + CAT", "#2f6fde"),
        (0.26, "library_top1", "compiled library", "#16a085"),
    ):
        bars = left.bar(places + offset, [row[key] for row in rows], 0.24, label=label, color=color)
        left.bar_label(bars, fmt="%.1f", fontsize=8, color="white", padding=-11)
    left.axhline(fp["top1"], color="#333333", linewidth=1, linestyle="--")
    left.annotate(f"FP32 {fp['top1']:.1f}", (0.5, fp["top1"]), ha="center", va="bottom", fontsize=8)
    lowest = min(min(row["quantized_top1"], row["corrected_top1"]) for row in rows)
    left.set_ylim(max(0.0, lowest - 4), min(fp["top1"] + 1.5, 101))
    left.set_xticks(places, [row["name"] for row in rows])
    left.set_ylabel("top-1, % of 600 test images")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    sizes = [fp["weight_bytes"] / 1024, *(row["weight_bytes"] / 1024 for row in rows)]
    bars = right.bar(
        ["FP32", *(row["name"] for row in rows)], sizes, color=["#9aa5b1"] + ["#2f6fde"] * len(rows)
    )
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set_ylabel("weights, KiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the results go")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of training")
    options = parser.parse_args(arguments)
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    started = time.perf_counter()
    torch.set_num_threads(min(2, os.cpu_count() or 1))

    split = load_split()
    network = train_network(console, split, options.epochs)
    images, labels = split.test
    fp = {
        "top1": top1(logits_of(network, images), labels),
        "weight_bytes": sum(p.numel() * 4 for p in network.parameters() if p.ndim > 1),
        "torch_us": latency_of(network, images[:1]),
        "torch_us_batch64": latency_of(network, images[:64]),
    }

    recipe = cat_plugin.load_recipe(HERE / "recipe.yaml")
    tune_images, tune_labels = split.tune
    recipe.run(
        network,
        calibration=split.calibration[0].split(BATCH),
        eval_fn=lambda model: top1(logits_of(model, tune_images), tune_labels) / 100,
    )
    rows = [
        measure(f"W{trial.config['w_bits']}A{trial.config['a_bits']}", trial.model, split, output, console)
        for trial in recipe.trials
    ]

    console.print(trial_table(recipe))
    others = [elsewhere(network, split, bits) for bits in (3, 2)]
    console.print(table_of(fp, rows, others))
    console.print(
        "RTN: every weight rounded to nearest by somebody else, on one scale a tensor; corrected, not compiled."
    )
    for row in rows:
        if row["library_differs_on"]:
            console.print(
                f"{row['name']}: library and PyTorch disagree on images {row['library_differs_on']}"
            )
    results = {
        "fp": fp,
        "rows": rows,
        "elsewhere": others,
        "seconds": time.perf_counter() - started,
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {
            name: version(name) for name in ("torch", "neural-compressor", "apache-tvm", "scikit-learn")
        },
    }
    staged = output / "results.json.tmp"
    staged.write_text(json.dumps(results, indent=2) + "\n")
    staged.replace(output / "results.json")
    chart(fp, rows, output / "results.png")
    console.print(f"{output / 'results.json'} and results.png written; {results['seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
