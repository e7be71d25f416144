"""Say on what a benchmark ran: processor, instruction sets, threads, load, and the versions of what took part.

Needs the standard library only, so that every environment can call it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["FLAGS_OF_NOTE", "PACKAGES", "machine", "versions"]

FLAGS_OF_NOTE = (
    "avx2", "fma", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""What decides the speed of small integers, under Linux's names."""

PACKAGES = (
    "torch", "torchao", "numpy", "scikit-learn", "neural-compressor", "apache-tvm", "apache-tvm-ffi", "brevitas",
    "aimet-torch", "nncf", "openvino", "onnx", "onnxruntime", "onnxscript", "timm", "transformers",
)  # fmt: skip
"""Distributions whose versions are recorded where they are installed."""

ENVIRONMENT = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS",
)  # fmt: skip


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those of `packages` that are installed here, without importing any."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def machine() -> dict[str, Any]:
    """Describe this machine and process, for the JSON of a benchmark.

    Returns
    -------
    dict
        ``cpu`` (model, family, flags of note, cores usable by this process), ``memory_gib``, ``system``, ``python``,
        ``versions``, ``environment`` (thread variables as set), ``load`` (one-minute average, to tell a quiet
        machine from a busy one) and ``utc``. JSON-able; no host or user name.
    """
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        memory = None
    return {
        "cpu": {
            "model": info.get("model name") or platform.processor() or platform.machine(),
            "family": info.get("cpu family"),
            "number": info.get("model"),
            "flags": [flag for flag in FLAGS_OF_NOTE if flag in flags],
            "cores": cores,
        },
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "utc": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }
