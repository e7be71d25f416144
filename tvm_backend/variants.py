"""Which of a library's variants this machine can run."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from cat_plugin.errors import LibraryError
from tvm_backend.processor import cpu_features, permit_amx

__all__ = ["choose", "obstacle"]


def obstacle(variant: dict[str, Any]) -> str | None:
    """Return why this processor cannot run a variant, or None where it can."""
    machine, available = platform.machine(), cpu_features()
    built_for = variant.get("machine", machine)
    if built_for != machine:
        return f"{variant['target']} (built for {built_for})"
    lacking = sorted(set(variant.get("features", ())) - available) if available is not None else []
    if not lacking and variant.get("amx") and not permit_amx():
        lacking = ["AMX tiles, which the operating system refuses"]
    return f"{variant['target']} needs {', '.join(lacking)}" if lacking else None


def choose(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the first variant that this processor can run.

    Raises
    ------
    LibraryError
        There is none.
    """
    reasons = []
    for variant in manifest["variants"]:
        reason = obstacle(variant)
        if reason is None:
            return dict(variant)
        reasons.append(reason)
    raise LibraryError(
        f"{path} cannot run on this {platform.machine()} processor: {'; '.join(reasons)}. "
        "Compile on this machine with target='native', or with target='portable'"
    )
