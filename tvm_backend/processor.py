"""What the processor can do, and what the operating system lets it do."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

__all__ = ["cpu_features", "permit_amx", "processor_name"]


def cpu_features() -> frozenset[str] | None:
    """What the processor can do, as ``/proc/cpuinfo`` names it; None where that cannot be found out."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def processor_name() -> str:
    """What the processor is called, for people."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (
        value.strip() for name, _, value in (line.partition(":") for line in lines) if "model name" in name
    )
    return next(found, platform.machine())


@functools.cache
def permit_amx() -> bool:
    """Ask Linux, once for the process, for the state of the AMX tiles; returns whether it was granted.

    The call is ``arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``; without it the first tile instruction is a fault.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0)
