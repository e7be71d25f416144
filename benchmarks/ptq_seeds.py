"""How far rows of :mod:`benchmarks.ptq_accuracy` are from themselves with another seed, and what more inputs make of them.

At 2 bits the least change redraws the error of every image, so that a row by itself says little about tenths of a point.  Each row is
measured with several seeds in one process; the mean and the standard deviation of top-1, divergence and agreement are kept::

    python -m benchmarks.ptq_seeds
    python -m benchmarks.ptq_seeds --rows 'resnet20/w2a2/*/fast' --seeds 16
    python -m benchmarks.ptq_seeds --samples 3072 --seeds 2

The error of the mean is the deviation over the root of the number of seeds; that the images evaluated are a sample of all is not in it.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
from pathlib import Path
from typing import Any

from benchmarks import ptq_accuracy, rows

__all__ = ["main", "spread"]

OUT = ptq_accuracy.OUT.with_name("ptq_seeds.json")
_NUMBERS = ("drop", "top1", "held_out_kl", "held_out_agreement")


def spread(name: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of what a row is with different seeds.

    Parameters
    ----------
    name
        Of the row.
    measured
        Two or more results of :func:`benchmarks.ptq_accuracy.measure`.

    Returns
    -------
    dict
        Mean of each number, and its deviation (over N - 1) under the same name with ``_sd``; points lost to full precision are ``drop``.
    """
    first = measured[0]
    each = [{**row, "drop": row["fp_top1"] - row["top1"]} for row in measured]
    result: dict[str, Any] = {
        "row": name,
        "model": first["model"],
        "bits": f"W{first['w_bits']}A{first['a_bits']}",
        "convention": first["convention"],
        "preset": first["preset"],
        "inputs": first["calibration"],
        "seeds": len(measured),
    }
    for number in _NUMBERS:
        values = [row[number] for row in each if number in row]
        if values:
            result[number] = round(statistics.fmean(values), 4)
            result[f"{number}_sd"] = round(statistics.stdev(values), 4)
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["resnet20/*/*/fast"],
        help="patterns of row names (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=8, help="how many, two or more (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="calibration inputs (default: as many as the rows have)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: one seed has no spread, give two or more")
    names = [
        row
        for row in ptq_accuracy.all_rows()
        if row.split("/")[0] in ptq_accuracy.BITS
        and row.split("/")[2] in ("default", "inputs", "strict")
        and any(fnmatch.fnmatchcase(row, pattern) for pattern in options.rows)
    ]
    for name in names:
        measured = [
            ptq_accuracy.measure(name, options.data, options.threads, seed=seed, samples=options.samples)
            for seed in range(options.seeds)
        ]
        row = spread(f"{name}/{options.samples}" if options.samples else name, measured)
        rows.merge(options.out, [row], ptq_accuracy.all_rows())
        print(f"{name}  lost {row['drop']:.2f} ({row['drop_sd']:.2f})", flush=True)


if __name__ == "__main__":
    main()
