"""ONNX files that people use, end to end: read, quantized to W8A8, bundled, compiled, and compared with ONNX Runtime's float32.

The text detector and the text-angle classifier of PP-OCR (package ``rapidocr-onnxruntime`` 1.4.4) and Magika's classifier of
file types (package ``magika`` 1.0.3), as their wheels hold them::

    pip download --no-deps rapidocr-onnxruntime==1.4.4 magika==1.0.3 -d wheels
    python -m benchmarks.real_files --wheels wheels --out docs/benchmarks/real_files.json

The networks of PP-OCR see lines of text that are rendered here, Magika the files of Python's own library. Every row of the
result is of inputs that the calibration has not seen; times are the minimum of many calls of one input, ours and ONNX
Runtime's in turns, on as many threads as ``OMP_NUM_THREADS`` and ``TVM_NUM_THREADS`` say.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine

CALIBRATION = 48
HELD_OUT = 64
CALLS = 50
_WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "0123456789",
    "invoice",
    "total",
    "amount",
    "date",
    "number",
    "street",
]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _page(generator: np.random.Generator, height: int, width: int, lines: int, size: int) -> np.ndarray:
    """Dark words on a light ground, pixels (height, width, 3), uint8."""
    from PIL import Image, ImageDraw, ImageFont

    ground = tuple(int(v) for v in generator.integers(150, 256, 3))
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    for line in range(lines):
        text = " ".join(generator.choice(_WORDS, 6))
        ink = tuple(int(v) for v in generator.integers(0, 110, 3))
        font = ImageFont.load_default(size=int(generator.integers(size * 2 // 3, size + 1)))
        place = (
            int(generator.integers(0, width // 4)),
            line * height // lines + int(generator.integers(0, 6)),
        )
        draw.text(place, text, fill=ink, font=font)
    noisy = np.asarray(image, dtype=np.float32) + generator.normal(0, 4, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def pages(count: int) -> torch.Tensor:
    """What the detector takes, (count, 3, 320, 320) float32."""
    generator = np.random.default_rng(0)
    made = np.stack([_page(generator, 320, 320, 7, 26) for _ in range(count)]) / 255.0
    return torch.from_numpy(((made - _MEAN) / _STD).transpose(0, 3, 1, 2).astype(np.float32))


def lines(count: int) -> torch.Tensor:
    """What the classifier takes, (count, 3, 48, 192) float32: every other line is upside down."""
    generator = np.random.default_rng(1)
    made = [_page(generator, 48, 192, 1, 34) for _ in range(count)]
    turned = [each[::-1, ::-1] if i % 2 else each for i, each in enumerate(made)]
    return torch.from_numpy((np.stack(turned) / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32))


def files(count: int) -> torch.Tensor:
    """What Magika takes, (count, 2048) int32: the first and the last 1024 bytes of a file, 256 where it has no more."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size > 64)
    by_kind: dict[str, list[Path]] = {}
    for path in found:
        by_kind.setdefault(path.suffix, []).append(path)
    kinds = sorted(by_kind)
    rows: list[np.ndarray] = []
    for turn in range(
        count
    ):  # a file of each kind in turn, so that calibration and evaluation see all of them
        for kind in kinds:
            if turn < len(by_kind[kind]) and len(rows) < count:
                content = by_kind[kind][turn].read_bytes()
                row = np.full(2048, 256, dtype=np.int32)
                first, last = content[:1024].lstrip()[:1024], content[-1024:].rstrip()[-1024:]
                row[: len(first)] = np.frombuffer(first, np.uint8)
                row[2048 - len(last) :] = np.frombuffer(last, np.uint8)
                rows.append(row)
    return torch.from_numpy(np.stack(rows)[np.random.default_rng(2).permutation(len(rows))])


def same_pixels(found: np.ndarray, expected: np.ndarray) -> float:
    """Intersection over union of what is taken for text, at the threshold of PP-OCR."""
    mine, theirs = found > 0.3, expected > 0.3
    return float((mine & theirs).sum() / max(1, (mine | theirs).sum()))


def same_class(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of rows with the same class."""
    return float((found.argmax(1) == expected.argmax(1)).mean())


@dataclass(frozen=True)
class Case:
    """A file, what goes into it, and how two results are compared."""

    wheel: str
    member: str
    inputs: Callable[[int], torch.Tensor]
    agreement: Callable[[np.ndarray, np.ndarray], float]


CASES = {
    "PP-OCRv4 detector": Case("rapidocr_onnxruntime-1.4.4", "ch_PP-OCRv4_det_infer.onnx", pages, same_pixels),
    "PP-OCR classifier": Case(
        "rapidocr_onnxruntime-1.4.4", "ch_ppocr_mobile_v2.0_cls_infer.onnx", lines, same_class
    ),
    "Magika": Case("magika-1.0.3", "standard_v3_3/model.onnx", files, same_class),
}


def extract(wheels: Path, case: Case, folder: Path) -> Path:
    """The file of a case, out of its wheel."""
    wheel = next(iter(sorted(wheels.glob(f"{case.wheel}-*.whl"))), None)
    if wheel is None:
        raise SystemExit(
            f"no wheel {case.wheel}-*.whl in {wheels}; get it as the first lines of this file say"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(case.member))
        (folder / "net.onnx").write_bytes(archive.read(member))
    return folder / "net.onnx"


def fastest(calls: list[Callable[[], Any]], rounds: int = CALLS) -> list[float]:
    """Milliseconds of the fastest call of each, called in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - started))
    return best


def measure(name: str, wheels: Path) -> dict[str, Any]:
    """One row."""
    import cat_plugin
    import tvm_backend
    from cat_plugin.graph.onnx.sessions import session_of
    from cat_plugin.ptq import QuantSpec, quantize

    case = CASES[name]
    x = case.inputs(CALIBRATION + HELD_OUT)
    calibration, held_out = x[:CALIBRATION], x[CALIBRATION:]
    with tempfile.TemporaryDirectory() as folder:
        path = extract(wheels, case, Path(folder))
        network = cat_plugin.load_onnx(path)
        started = time.perf_counter()
        spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=16)
        quantized, _ = quantize(network, spec, list(calibration.split(16)))
        row: dict[str, Any] = {"network": name, "quantize_s": round(time.perf_counter() - started, 1)}
        bundle = cat_plugin.export_bundle(quantized, calibration[:2], Path(folder) / "bundle")
        started = time.perf_counter()
        tvm_backend.compile(bundle, out=Path(folder) / "net.so")
        row["compile_s"] = round(time.perf_counter() - started, 1)
        library = tvm_backend.load(Path(folder) / "net.so")
        session = session_of(str(path))
        key = session.get_inputs()[0].name
        expected = np.concatenate([session.run(None, {key: each.numpy()})[0] for each in held_out.split(1)])
        found = np.concatenate([np.asarray(library(each.numpy())) for each in held_out.split(1)])
        with torch.no_grad():
            graph = np.concatenate([quantized(each).numpy() for each in held_out.split(1)])
        row["relative_error"] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        row["agreement"] = case.agreement(found, expected)
        row["library_to_graph"] = float(np.abs(found - graph).max() / np.abs(graph).max())
        one = held_out[:1].numpy()
        times = fastest([lambda: library(one), lambda: session.run(None, {key: one})])
        row["library_ms"], row["onnxruntime_ms"] = (round(each, 3) for each in times)
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    made = [
        "| file | relative error | agreement | library, ms | ONNX Runtime float32, ms | quantize, s | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    made += [
        f"| {row['network']} | {row['relative_error']:.3f} | {row['agreement']:.1%} | {row['library_ms']:.2f} | "
        f"{row['onnxruntime_ms']:.2f} | {row['quantize_s']:.0f} | {row['compile_s']:.0f} |"
        for row in rows
    ]
    return "\n".join(made)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="the folder of the two wheels")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    rows = [measure(name, options.wheels) for name in options.networks]
    print(table(rows))
    if options.out is not None:
        result = {"machine": machine(), "calibration": CALIBRATION, "held_out": HELD_OUT, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
