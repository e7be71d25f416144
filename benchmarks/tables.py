"""Fill the tables of Markdown pages from the JSON that the benchmarks wrote, so that no number is copied by hand.

A page holds a place such as::

    <!-- table speed.json: peer precision model batch ms -->
    <!-- end -->

and what stands between the two comments is replaced by the rows of ``docs/benchmarks/speed.json``, with these columns.
``column=value`` instead of a name keeps only the rows with that value. Rows without a number show their reason.

``<!-- speeds inference.json: cat-ptq/w8a8 openvino/int8 -->`` puts the milliseconds of whole models beside each other, one row a model, one
column for each peer and precision (``_`` for a space), batch sizes parted by a stroke; the fastest at 8 bits is bold.

    python -m benchmarks.tables benchmarks/README.md docs/benchmarks/*.md
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

__all__ = ["fill", "rows_of", "speeds", "table"]

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PLACE = re.compile(r"(<!-- (table|speeds) (\S+?): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_EIGHT_BITS = ("w8a8", "w8a8 free", "int8")


def rows_of(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a benchmark's JSON and the machine they were measured on.

    Parameters
    ----------
    path
        Holds ``rows``, or ``results`` with the rows or with one group of rows a peer.

    Returns
    -------
    rows, machine
        In the order of the file.
    """
    data = json.loads(path.read_text())
    entries = data.get("rows", data.get("results", []))
    machine = data.get("machine") or next((entry["machine"] for entry in entries if entry.get("machine")), {})
    rows: list[dict[str, Any]] = []
    for entry in entries:
        rows.extend(entry.get("rows", [entry]))
    return rows, machine


def _cell(value: Any) -> str:
    if isinstance(value, list):  # a median with its spread
        value = value[0] if value else ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Return rows as a Markdown table.

    Parameters
    ----------
    rows
        With any keys.
    columns
        Keys to show, in order; ``key=value`` keeps the rows with this value and shows no column.

    Returns
    -------
    str
        The reason of a row without numbers stands in its last column.
    """
    wanted = dict(column.split("=", 1) for column in columns if "=" in column)
    shown = [column for column in columns if "=" not in column]
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    for row in rows:
        if any(
            str(row.get(key)) != value for key, value in wanted.items() if "reason" not in row or key in row
        ):
            continue
        cells = [_cell(row.get(column, "")) for column in shown]
        if "reason" in row:
            cells[-1] = _cell(row["reason"])[:160]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speeds(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Return the times of whole models as a Markdown table.

    Parameters
    ----------
    rows
        With ``model``, ``batch``, ``peer``, ``precision`` and ``ms``.
    columns
        ``peer/precision``.

    Returns
    -------
    str
        One line a model; what was not measured is a dash.
    """
    keys = [(peer, precision.replace("_", " ")) for peer, precision in (c.split("/") for c in columns)]
    times = {
        (r.get("model"), r.get("batch"), r.get("peer"), r.get("precision")): r["ms"]
        for r in rows
        if "ms" in r
    }
    models = list(dict.fromkeys(model for model, *_ in times))
    batches = sorted({batch for _, batch, *_ in times})
    lines = [
        "| ms at batch " + " / ".join(map(str, batches)) + " | " + " | ".join(map(" ".join, keys)) + " |"
    ]
    lines.append("|" + "---|" * (len(keys) + 1))
    for model in models:
        fastest = {
            batch: min(
                (times.get((model, batch, *key), math.inf) for key in keys if key[1] in _EIGHT_BITS),
                default=math.inf,
            )
            for batch in batches
        }
        cells = []
        for key in keys:
            parts = []
            for batch in batches:
                ms = times.get((model, batch, *key))
                text = "-" if ms is None else f"{ms:.3g}"
                parts.append(f"**{text}**" if ms == fastest[batch] and key[1] in _EIGHT_BITS else text)
            cells.append(" / ".join(parts))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _where(machine: dict[str, Any]) -> str:
    """Say in one line on what a table was measured."""
    cpu = machine.get("gpu") or machine.get("cpu", "machine not recorded")
    if isinstance(cpu, dict):
        cpu = f"{cpu.get('model')} ({' '.join(cpu.get('flags', []))})"
    parts = [cpu]
    if machine.get("load") is not None:
        parts.append(f"load {machine['load']} at the start")
    if machine.get("utc"):
        parts.append(machine["utc"])
    return ", ".join(parts)


def fill(text: str, results: Path = RESULTS) -> str:
    """Return a page with its tables filled in from the JSON files in `results`."""

    def replace(place: re.Match[str]) -> str:
        begin, kind, name, columns, end = place.groups()
        path = results / name
        if not path.exists():
            return f"{begin}\nNot measured yet.\n\n{end}"
        rows, machine = rows_of(path)
        made = (speeds if kind == "speeds" else table)(rows, columns.split())
        return f"{begin}\n{made}\n\n{_where(machine)}\n\n{end}"

    return PLACE.sub(replace, text)


def main() -> None:
    """Fill the pages named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON files (%(default)s)"
    )
    options = parser.parse_args()
    for page in options.pages:
        before = page.read_text()
        after = fill(before, options.results)
        if after != before:
            page.write_text(after)
            print(f"{page}: tables filled")


if __name__ == "__main__":
    main()
