"""Requests a second, latencies and memory of the server in ``examples/serving``, on loopback.

    python -m benchmarks.serving [--rates 300 1000] [--seconds 20] [--data FOLDER]     ResNet-20, prepared first where it is not yet
    python -m benchmarks.serving model.so --rates 1000 --seconds 600                   a soak of ten minutes

The server runs in a process of its own with one thread a call; the requests come from this one, on the same processors.  Rows are
merged into the JSON, from which ``python -m benchmarks.tables docs/examples/serving.md`` fills the table.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.peers.environments import CACHE, CHECKOUT
from examples.serving.load import input_shape, load, serving

OUT = CHECKOUT / "docs" / "benchmarks" / "serving.json"

_SETTLED = 60.0  # seconds after which the server's memory is expected to be what it will be


def row_of(asked: float, seconds: float, found: dict[str, Any], system_load: float) -> dict[str, Any]:
    """A row of the table from what the load test found.

    Parameters
    ----------
    asked, seconds
        Requests a second, and for how long.
    found
        What :func:`examples.serving.load.load` returned.
    system_load
        The machine's load average before.

    Returns
    -------
    dict
        ``grown_mb`` is the server's memory at the end over that after a minute, or after half of a shorter test.
    """
    answered, resident = found["statuses"].get("200", 0), found["resident"]
    settled = next(size for at, size in resident if at >= min(_SETTLED, seconds / 2))
    return {
        "row": f"{asked:g} a second for {seconds:g} s",
        "asked": asked,
        "seconds": seconds,
        "reached": found["rate"],
        "answered": answered,
        "refused": round(asked * seconds) - answered,
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "most_ms": found["most_ms"],
        "resident_mb": round(resident[-1][1] / 2**20, 1),
        "grown_mb": round((resident[-1][1] - settled) / 2**20, 1),
        "resident": resident,
        "statuses": found["statuses"],
        "load": system_load,
    }


def main(argv: list[str] | None = None) -> None:
    """Serve, load, and print and keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "library", type=Path, nargs="?", help="a compiled classifier (default: ResNet-20's W8A8)"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[300.0, 1000.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each rate (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a call of the library (%(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where ResNet-20 is kept (%(default)s)")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--out", type=Path, help=f"JSON to merge into (of ResNet-20: {OUT})")
    options = parser.parse_args(argv)
    library, out = options.library, options.out
    if library is None:
        from benchmarks.inference_ours import prepare

        library = prepare("resnet20", "w8a8", [1, 16], options.cache, options.data)
        out = out or OUT
    shape = input_shape(library)
    for rate in options.rates:
        before = round(os.getloadavg()[0], 2)
        with serving(library, ["--threads", str(options.threads)]) as url:
            found = asyncio.run(load(url, shape, rate, options.seconds))
        row = row_of(rate, options.seconds, found, before)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "resident"), flush=True)
        if out:
            rows.merge(out, [row], [])


if __name__ == "__main__":
    main()
