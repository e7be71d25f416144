"""Rows of a benchmark: merged into its JSON as they are measured, one after the other or several at a time."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from cat_plugin.files import write_text

__all__ = ["merge", "side_by_side"]


def merge(path: Path, rows: Sequence[dict[str, Any]], order: Sequence[str]) -> None:
    """Put rows into a JSON in the place of those of the same names.

    Parameters
    ----------
    path
        The JSON; made if missing.
    rows
        With their name under ``row``.
    order
        Names of rows as they are to stand; others follow.
    """
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    names = {row["row"] for row in rows}
    kept = [other for other in known if other["row"] not in names] + list(rows)
    places = {name: place for place, name in enumerate(order)}
    kept.sort(key=lambda row: places.get(row["row"], len(places)))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "versions": versions(), "rows": kept}
    write_text(path, json.dumps(content, indent=1) + "\n")


def side_by_side(
    names: Sequence[str],
    command: Callable[[str, Path], list[str]],
    keep: Callable[[list[dict[str, Any]]], None],
    jobs: int,
    minutes: float | None,
) -> None:
    """Measure rows in processes of their own, some at a time: on a GPU they wait for Python more than for each other.

    Parameters
    ----------
    names
        Of the rows, in the order in which they are begun.
    command
        Makes the command that measures a row and writes it to a JSON.
    keep
        Takes the rows of each JSON.
    jobs
        How many at a time.
    minutes
        After so many none is begun; None begins all.
    """
    lock, started = threading.Lock(), time.perf_counter()

    def run(name: str) -> None:
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            return
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "row.json"
            subprocess.run(command(name, part), check=False)
            if part.exists():
                with lock:
                    keep(json.loads(part.read_text())["rows"])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, names))
