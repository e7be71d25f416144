"""Whole models under NVIDIA's compute-sanitizer for :mod:`benchmarks.cuda`, where it is installed.

``memcheck`` finds access outside of what is allocated, ``initcheck`` values that depend on memory that nothing has written.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["call_once", "find", "sanitize"]

Keep = Callable[[dict[str, Any]], None]
_TOOLS = ("initcheck", "memcheck")


def find() -> str | None:
    """The path of compute-sanitizer, if there is one: on the path, or from the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def call_once(path: Path) -> None:
    """Call a library twice at each of its batch sizes up to 16, the second time by a graph: what runs under the sanitizer."""
    import tvm_backend
    from tvm_backend.verify import read_checks

    library = tvm_backend.load(path)
    whole = max(read_checks(library.manifest, path).runs, key=len)
    for batch in library.manifest["batch_sizes"]:
        if batch <= 16:
            rows = np.arange(batch) % len(whole)
            for _ in range(2):
                library.flat(*(array[rows] for array in whole.inputs))


def sanitize(paths: Sequence[Path], deadline: float, keep: Keep) -> None:
    """Run each library under each tool.

    Parameters
    ----------
    paths : sequence of pathlib.Path
        The libraries.
    deadline : float
        Of ``time.monotonic()``; what is not done by then is left out, and said.
    keep : callable
        Takes the rows of the results.
    """
    program = find()
    for path in paths if program else ():
        for tool in _TOOLS:
            row: dict[str, Any] = {"name": f"{path.stem}, {tool}", "kind": "sanitizer"}
            command = [str(program), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            command += [sys.executable, "-m", "benchmarks.cuda", "call", str(path)]
            row |= _run(command, max(0.0, deadline - time.monotonic()))
            keep(row)
            print(f"{row['name']:<44} {row['fault'] or 'no errors'}", flush=True)


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    # In a group of its own: what the sanitizer has started ends with it.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"correct": None, "fault": "not reached in the time there was"}
    return _judged(process.returncode, text)


def _judged(code: int, text: str) -> dict[str, Any]:
    """What a run found: its first error, with the kernel where it happened."""
    told = [
        line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")
    ]
    count = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if code == 0 and count and count[1] == "0":
        return {"correct": True, "fault": None}
    errors = [line for line in told if not re.match(r"COMPUTE-SANITIZER|ERROR SUMMARY|$", line)]
    return {"correct": False, "fault": "; ".join(errors[:3])[:400] or f"exit status {code}: {text[-200:]}"}
