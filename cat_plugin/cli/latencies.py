"""The latencies of all runtimes that are given, for ``cat-ptq benchmark`` and ``cat-ptq report``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cat_plugin.cli.console import state

__all__ = ["conditions", "measured_latencies"]


def conditions() -> dict[str, Any]:
    """On what latencies are about to be measured; to be asked before, since measuring is load as well.

    Returns
    -------
    dict
        ``processor``, how many ``cpus`` this process has, and the ``load`` of the last minute, in processors.
    """
    from tvm_backend.processor import processor_name

    return {
        "processor": processor_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def measured_latencies(
    library: Path | None,
    bundle: Path | None,
    model: tuple[str, Path | None, int | None] | None,
    batches: Sequence[int],
    seconds: float,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Measure every runtime that is given, each in a process of its own.

    Parameters
    ----------
    library, bundle : pathlib.Path or None
        What to run with TVM, and what with PyTorch.
    model : tuple or None
        Name, weights and number of classes of the full-precision model; needs `library` or `bundle` for the shapes.
    batches : sequence of int
        Batch sizes to time.
    seconds : float
        For each runtime and batch size.
    threads : int, optional
        Of each runtime, the same for all; as many as this process has processors if not given.

    Returns
    -------
    list of dict
        ``runtime`` (a name for people), ``batch``, ``median_ms``, ``p10_ms``, ``p90_ms``, ``calls``, ``threads``.
    """
    from cat_plugin.cli.timing import measure

    jobs: list[tuple[str, dict[str, Any]]] = []
    signature: list[dict[str, Any]] | None = None
    if library is not None:
        from tvm_backend.description import read_manifest

        signature = read_manifest(library)["inputs"]
        jobs.append(("compiled library", {"runtime": "library", "path": str(library)}))
    if bundle is not None:
        from cat_plugin.graph.bundle import read_bundle

        signature = signature or read_bundle(bundle).manifest["inputs"]
        jobs.append(("PyTorch, quantized graph", {"runtime": "bundle", "path": str(bundle)}))
    if model is not None and signature is not None:
        name, weights, num_classes = model
        jobs.append(
            (
                "PyTorch, float32 model",
                {
                    "runtime": "float",
                    "model": name,
                    "weights": None if weights is None else str(weights),
                    "num_classes": num_classes,
                    "inputs": signature,
                },
            )
        )
    rows = []
    threads = threads or len(os.sched_getaffinity(0))
    for title, job in jobs:
        with state.working(f"measuring: {title}"):
            job |= {"batches": list(batches), "seconds": seconds}
            rows += [{"runtime": title, **row, "threads": threads} for row in measure(job, threads)]
    return rows
