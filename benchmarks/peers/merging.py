"""Rows of the peers in their JSON: what was measured again replaces what it repeats, all else stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from cat_plugin.files import write_text

__all__ = ["merge", "merge_into"]

_KEY = ("peer", "model", "w_bits", "a_bits", "bits", "method", "batch", "precision")  # what a row is about


def merge(known: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with those measured in the place of older ones about the same."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in _KEY)

    new = {key(row): row for row in measured}
    return [new.pop(key(row), row) for row in known] + list(new.values())


def merge_into(
    path: Path, measured: list[dict[str, Any]], seen: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Merge rows into a JSON, which is made if missing, and return all that it then holds.

    Parameters
    ----------
    path
        The JSON.
    measured
        Rows.
    seen
        The machine as the peer's script saw it; None looks at this one.
    """
    rows = merge(json.loads(path.read_text())["rows"] if path.exists() else [], measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"machine": seen or machine(), "rows": rows}, indent=1) + "\n")
    return rows
