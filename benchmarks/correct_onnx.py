"""What the correction adds to classifiers that ONNX Runtime quantized: top-1 over all 1000 classes, before and after.

Each network is written as ONNX in full precision, quantized by ``onnxruntime.quantization.quantize_static`` (QDQ, weights
per channel, its own calibration), and corrected by what ``cat-ptq correct`` calls. Of the 1000 unlabelled images one of
each class, 200 calibrate the quantizer and 800 fit the correction; both are evaluated on 2000 others::

    python -m benchmarks.correct_onnx --out docs/benchmarks/correct_onnx.json
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, versions
from benchmarks.models import data_root, mobilenet_v2

CALIBRATION = 200
BATCH = 50
BITS = {"W8A8": ("QInt8", "QUInt8"), "W4A8": ("QInt4", "QUInt8"), "W4A4": ("QInt4", "QUInt4")}


def _efficientnet(root: Path) -> torch.nn.Module:
    source = root / "efficientnet_lite0" / "efficientnet_lite0.py"
    spec = importlib.util.spec_from_file_location("efficientnet_lite0", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = module.efficientnet_lite0().eval()
    return network


# how the network is made, what its input is to pixels, and the logit of class 0
NETWORKS: dict[str, tuple[Callable[[Path], torch.nn.Module], Callable[[np.ndarray], np.ndarray], int]] = {
    "mobilenet_v2": (mobilenet_v2, lambda pixels: pixels / 127.5 - 1, 1),
    "efficientnet_lite0": (_efficientnet, lambda pixels: (pixels - 127) / 128, 0),
}


def images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3, 224, 224), uint8, and class indices of a folder with labels.csv, in the order of the files' names."""
    from PIL import Image

    with (folder / "labels.csv").open(newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: row["file"])
    pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB")).transpose(2, 0, 1) for row in rows]
    return np.stack(pixels), np.array([int(row["class_index"]) for row in rows])


def quantize(
    path: Path, out: Path, name: str, batches: Callable[[], Iterator[np.ndarray]], bits: str
) -> None:
    """Quantize an ONNX file with ONNX Runtime's static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = batches()

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch}

    ready = path.with_suffix(".pre.onnx")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    weights, activations = BITS[bits]
    quantize_static(
        str(ready),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
        per_channel=True,
    )


def hits(logits: np.ndarray, labels: np.ndarray, first: int) -> np.ndarray:
    """Per row, whether the largest of the 1000 logits is at its label."""
    return np.asarray(logits[:, first:].argmax(1) == labels)


def percent(right: np.ndarray) -> float:
    """Share of the rows that are right."""
    return round(100.0 * float(right.mean()), 2)


def paired_error(after: np.ndarray, before: np.ndarray) -> float:
    """Standard error, in points, of the difference of two top-1s on the same rows."""
    change = after.astype(np.float64) - before
    return round(100.0 * float(change.std(ddof=1)) / len(change) ** 0.5, 2)


def measure(network: str, root: Path, bits: list[str]) -> list[dict[str, Any]]:
    """All rows of one network."""
    from cat_plugin import export_onnx
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.onnx import append_step, correct_logits
    from cat_plugin.graph.onnx.files import read_model
    from cat_plugin.graph.onnx.sessions import OnnxClassifier, collect

    make, prepare, first = NETWORKS[network]
    pixels, _ = images(root / "imagenet_sample" / "images")
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    held_out, labels = images(root / "imagenette" / "evaluation")

    def batches(source: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(source), BATCH):
            yield prepare(source[start : start + BATCH].astype(np.float32)).astype(np.float32)

    def logits_of(path: Path, source: np.ndarray) -> np.ndarray:
        return collect(OnnxClassifier(read_model(path)), batches(source), network)

    fit = pixels[CALIBRATION:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        full = export_onnx(make(root), Path(folder) / "fp.onnx", torch.zeros(2, 3, 224, 224))
        name = read_model(full).graph.input[0].name
        reference = logits_of(full, fit)
        exact = percent(hits(logits_of(full, held_out), labels, first))
        for each in bits:
            low = Path(folder) / f"{each}.onnx"
            quantize(full, low, name, lambda: batches(pixels[:CALIBRATION]), each)
            row: dict[str, Any] = {"network": network, "bits": each, "fp": exact}
            uncorrected = hits(logits_of(low, held_out), labels, first)
            row["before"] = percent(uncorrected)
            known = logits_of(low, fit)
            for setting, estimator in (
                ("paper", ClusterAffine.paper()),
                ("auto", ClusterAffine(random_state=0)),
            ):
                started = time.perf_counter()
                fitted = correct_logits(known, reference, estimator=estimator)
                row[f"{setting}_fit_s"] = round(time.perf_counter() - started, 1)
                corrected = append_step(low, fitted, Path(folder) / "corrected.onnx")
                right = hits(logits_of(corrected, held_out), labels, first)
                row[setting], row[f"{setting}_error"] = percent(right), paired_error(right, uncorrected)
                row[f"{setting}_map"] = (
                    f"{fitted.parameters_.mode}, K {fitted.parameters_.n_clusters}, alpha "
                    f"{fitted.parameters_.alpha:g}"
                )
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | bits | full precision | quantized | paper's CAT | `auto` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']} | {row['bits']} | {row['fp']:.2f} | {row['before']:.2f} | "
        f"{row['paper']:.2f} ({row['paper'] - row['before']:+.2f} ± {row['paper_error']:.2f}) | "
        f"{row['auto']:.2f} ({row['auto'] - row['before']:+.2f} ± {row['auto_error']:.2f}) |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument(
        "--root", default=None, help="the folder of the data; ../shared/data beside the checkout"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    root = data_root(options.root)
    rows = [row for network in options.networks for row in measure(network, root, options.bits)]
    print(table(rows))
    if options.out is not None:
        result = {"machine": machine(), "versions": versions(), "calibration": CALIBRATION, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
