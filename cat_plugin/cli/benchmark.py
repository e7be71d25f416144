"""``cat-ptq benchmark``: latency of a compiled library by batch size, beside PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cat_plugin.cli.console import state
from cat_plugin.cli.latencies import conditions, measured_latencies
from cat_plugin.cli.options import (
    Model,
    NumClasses,
    Threads,
    Weights,
    library_exists,
    sources_exist,
    tvm_backend,
    whole_numbers,
)
from cat_plugin.errors import CATError, CATValueError

__all__ = ["benchmark"]


def benchmark(
    library: Annotated[Path, typer.Argument(help="A compiled library.")],
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="The bundle that it was compiled from, for PyTorch's time."),
    ] = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes.")] = "1,16",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Time for each runtime and batch size.")
    ] = 2.0,
    threads: Threads = None,
) -> None:
    """Measure the latency of a compiled library, beside PyTorch's.

    --bundle adds the same quantized graph in PyTorch, --model the full-precision model. Every runtime has a process
    of its own and as many threads as the others. On a busy machine the times are not worth much.
    """
    from cat_plugin.report.figures import milliseconds

    sizes = whole_numbers(batch, "--batch")
    if not sizes:
        raise CATValueError("--batch is empty; give batch sizes such as 1,16")
    library_exists(library)
    sources_exist(weights=weights)
    tvm_backend()
    if (bundle or model) and importlib.util.find_spec("torch") is None:
        raise CATError(
            "PyTorch is not installed, and --bundle and --model need it: pip install 'cat-ptq[torch]'"
        )
    named = None if model is None else (model, weights, num_classes)
    here = conditions()
    rows = measured_latencies(library, bundle, named, sizes, seconds, threads)
    values = {
        "library": str(library),
        "rows": rows,
        "threads": rows[0]["threads"],
        **here,
    }
    fastest = {
        row["batch"]: row["median_ms"] for row in reversed(rows) if row["runtime"] == rows[0]["runtime"]
    }

    def table() -> Table:
        shown = Table(
            box=None,
            caption=f"{here['processor']}, {values['threads']} of {here['cpus']} processors, load before {here['load']}",
            caption_justify="left",
        )
        for heading in ("runtime", "batch", "median", "p10", "p90", "a sample", "times the library's"):
            shown.add_column(heading, justify="left" if heading == "runtime" else "right")
        for row in rows:
            times = [milliseconds(row[key]) for key in ("median_ms", "p10_ms", "p90_ms")]
            ratio = row["median_ms"] / fastest[row["batch"]]
            each = milliseconds(row["median_ms"] / row["batch"])
            shown.add_row(row["runtime"], str(row["batch"]), *times, each, f"{ratio:.2f}")
        return shown

    state.report(values, table, "rows")
