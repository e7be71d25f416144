"""A configuration in a few words, as tables and progress bars show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe"]


def describe(params: Mapping[str, Any]) -> str:
    """One line for a configuration: ``W4A4 fast, K 64, alpha 0.4``."""
    base = params.get("base")
    if base is not None:
        name = next(iter(base)) if isinstance(base, Mapping) else str(base)
        bits = (
            base[name].get("bits") if isinstance(base, Mapping) and isinstance(base[name], Mapping) else None
        )
        what = f"{name} {bits} bit" if bits is not None else name
    else:
        what = f"W{params.get('w_bits', 4)}A{params.get('a_bits', 4)} {params.get('preset', 'balanced')}"
    return f"{what}, K {params.get('num_clusters', 64)}, alpha {params.get('alpha', 0.4)}"
