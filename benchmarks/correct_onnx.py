"""What the correction adds to classifiers that ONNX Runtime quantized: top-1 over all 1000 classes, before and after.

Each network is written as ONNX in full precision, quantized by ``onnxruntime.quantization.quantize_static`` (QDQ, weights
per channel, its own calibration), and corrected by what ``cat-ptq correct`` calls. Of the 1000 unlabelled images one of
each class, 200 calibrate the quantizer and 800 fit the correction; both are evaluated on 2000 others::

    python -m benchmarks.correct_onnx --out docs/benchmarks/correct_onnx.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, versions
from benchmarks.models import IMAGENET_INPUTS, MODELS, data_root, labelled_images

CALIBRATION = 200
BATCH = 50
BITS = {"W8A8": ("QInt8", "QUInt8"), "W4A8": ("QInt4", "QUInt8"), "W4A4": ("QInt4", "QUInt4")}


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

    prepare, first = IMAGENET_INPUTS[network]
    order = np.random.default_rng(0).permutation(1000)
    pixels, _ = labelled_images(root / "imagenet_sample" / "images", order=order)
    held_out, labels = labelled_images(root / "imagenette" / "evaluation")

    def batches(source: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(source), BATCH):
            channels_first = source[start : start + BATCH].transpose(0, 3, 1, 2)
            yield prepare(torch.from_numpy(channels_first.astype(np.float32))).numpy()

    def logits_of(path: Path, source: np.ndarray) -> np.ndarray:
        return collect(OnnxClassifier(read_model(path)), batches(source), network)

    fit = pixels[CALIBRATION:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        full = export_onnx(MODELS[network](root), Path(folder) / "fp.onnx", torch.zeros(2, 3, 224, 224))
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
    parser.add_argument("--networks", nargs="+", choices=IMAGENET_INPUTS, default=list(IMAGENET_INPUTS))
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
