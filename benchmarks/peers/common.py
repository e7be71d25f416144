"""What the scripts of the peers share: the command line, rows written as they are measured, the stopwatch.

A row that could not be measured holds the reason in place of the number, and the script goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine, versions
from benchmarks.models import MODELS, Split, share, split_of, top1_among_ten

__all__ = [
    "ACCURACY_BITS",
    "BATCHES",
    "Rows",
    "accuracy_parser",
    "accuracy_split",
    "bits_of",
    "images_of",
    "median_ms",
    "model_folder",
    "relative_error",
    "score",
    "speed_parser",
    "timed",
]

_IMAGENET_BITS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
ACCURACY_BITS = {
    "resnet20": ("w4a4", "w3a3", "w2a4", "w2a2"),
    "mobilenet_v2": _IMAGENET_BITS,
    "efficientnet_lite0": _IMAGENET_BITS,
}
"""The bit-widths of the accuracy table, by model."""

CALIBRATION = {"resnet20": 1024, "mobilenet_v2": 750, "efficientnet_lite0": 750}
BATCHES = (1, 16)


def bits_of(name: str) -> tuple[int, int]:
    """Return weight and activation bits from a name such as ``w4a8``."""
    weight, activation = name.lower().removeprefix("w").split("a")
    return int(weight), int(activation)


def accuracy_split(model: str, root: str | None, samples: int | None = None) -> Split:
    """Return the images that belong to a model, to calibrate as many as the tables use unless `samples` are asked."""
    return split_of(model, root, calibration=samples or CALIBRATION[model])


def images_of(model: str, root: str | None, batch: int) -> Tensor:
    """Return the first evaluation images in the model's size: what speed is measured on, since an int8 model that is
    given noise would saturate and its error would say nothing."""
    return split_of(model, root, calibration=0, evaluation=batch).evaluation.clone()


def _parser(description: str | None, models: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--threads", type=int, default=2, help="threads for one call (default: %(default)s)")
    return parser


def accuracy_parser(description: str | None, methods: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the options of an accuracy script; `methods` are the peer's own, all run unless told otherwise."""
    parser = _parser(description, tuple(ACCURACY_BITS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--samples", type=int, help="to calibrate on (default: 1024 for ResNet-20, else 750)")
    parser.add_argument("--bits", nargs="+", help="such as w4a4 w2a2 (default: those of the table, by model)")
    parser.add_argument(
        "--logits", type=Path, help="folder to store each row's logits in, for benchmarks.plug_in"
    )
    return parser


def speed_parser(description: str | None, precisions: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the options of a speed script; `precisions` are what the peer can run."""
    parser = _parser(description, tuple(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=list(precisions))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="timed seconds a row (default: %(default)s)"
    )
    parser.add_argument("--kept", type=Path, help="folder of converted models, kept from run to run")
    return parser


@contextlib.contextmanager
def model_folder(kept: Path | None) -> Iterator[Path]:
    """The folder of converted models: the one to keep, or one that goes away."""
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    kept.mkdir(parents=True, exist_ok=True)
    yield kept


class Rows:
    """The rows of one run, written to disk after each, so that an interrupted run keeps what it has.

    Parameters
    ----------
    path
        The JSON file: ``{"machine": ..., "rows": [...]}``.
    peer
        Name of the distribution; its version goes into every row.
    """

    def __init__(self, path: Path, peer: str) -> None:
        self.path, self.peer = path, peer
        self.version = versions((peer,)).get(peer, "?")
        self.machine = machine()
        self.rows: list[dict[str, Any]] = []
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(self.path.name + ".part")
        staged.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
        os.replace(staged, self.path)

    @contextlib.contextmanager
    def row(self, **key: Any) -> Iterator[dict[str, Any]]:
        """Measure one row: the block fills in the numbers; what it raises becomes the row's ``reason``.

        Parameters
        ----------
        **key
            What the row is about: model, bits or precision, batch, method.

        Yields
        ------
        dict
            The row, to be filled in.
        """
        row: dict[str, Any] = {"peer": self.peer, "version": self.version, **key}
        try:
            yield row
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            row["reason"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self.rows.append(row)
        self._write()
        print("  ".join(f"{k} {v}" for k, v in row.items() if k != "version"), flush=True)


@contextlib.contextmanager
def timed(row: dict[str, Any]) -> Iterator[None]:
    """Write into `row` the ``seconds`` that the block takes, what the process computes in them (``cpu_seconds``, over all
    threads: the better guide where the machine is shared), and the ``threads`` that torch uses."""
    start, busy = time.perf_counter(), time.process_time()
    yield
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["cpu_seconds"] = round(time.process_time() - busy, 1)
    row["threads"] = torch.get_num_threads()


@torch.no_grad()
def score(row: dict[str, Any], quantized: Callable[[Tensor], Any], split: Split, options: Any) -> None:
    """Write into `row` what a quantized model answers right; with ``--logits`` its logits are stored as well.

    Parameters
    ----------
    row
        Of :meth:`Rows.row`, with its model, bits and method.
    quantized
        Gives logits (N, C).
    split
        With the images that it was calibrated on and those to evaluate on.
    options
        Of :func:`accuracy_parser`. The file in ``logits`` holds those of the quantized and the full-precision model on all images
        to calibrate on (``z_q``, ``z_fp``), how many of them the quantizer was given (``used``), and those to evaluate
        (``e_q``), with ``labels``.
    """

    def of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        return torch.cat([torch.as_tensor(model(x)).float() for x in images.split(50)])

    e_q, labels = of(quantized, split.evaluation), split.evaluation_labels
    row["top1"] = share(e_q.argmax(1), labels)
    among_ten = top1_among_ten(row["model"], e_q, labels)
    if among_ten is not None:
        row["top1_ten"] = among_ten
    if options.logits is None:
        return
    known = split_of(row["model"], options.data, evaluation=0).calibration
    full = MODELS[row["model"]](options.data).eval()
    options.logits.mkdir(parents=True, exist_ok=True)
    words = (row["peer"], row["model"], f"w{row['w_bits']}a{row['a_bits']}", row["method"])
    np.savez(
        options.logits / ("_".join(words).replace(" ", "-").replace("/", "-") + ".npz"),
        z_q=of(quantized, known), z_fp=of(full, known), e_q=e_q, labels=labels,
        used=len(split.calibration), key=json.dumps({k: row[k] for k in ("peer", "model", "w_bits", "a_bits", "method")}),
    )  # fmt: skip


def median_ms(
    call: Callable[[], Any], seconds: float = 3.0, least: int = 11, most: int = 1000
) -> dict[str, Any]:
    """Time a call: warm up, then repeat for `seconds`, at least `least` and at most `most` times.

    Parameters
    ----------
    call
        Does the work once and has finished it when it returns.
    seconds
        How long to go on, in seconds.
    least, most
        Bounds on the number of timed runs.

    Returns
    -------
    dict
        ``ms`` (median), ``ms_p10``, ``ms_p90``, ``runs``; milliseconds a call.
    """
    end = time.perf_counter() + seconds / 5
    for done in range(most):
        call()
        if done >= 2 and time.perf_counter() > end:
            break
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < most and (len(times) < least or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    tenths = statistics.quantiles(times, n=10)
    return {
        "ms": round(statistics.median(times), 4),
        "ms_p10": round(tenths[0], 4),
        "ms_p90": round(tenths[-1], 4),
        "runs": len(times),
    }


def relative_error(result: Any, reference: Any) -> float:
    """Return the norm of the difference over the norm of the reference: that the timed model computes the model."""
    a, b = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    return round(float(np.linalg.norm(a - b) / np.linalg.norm(b)), 5)
