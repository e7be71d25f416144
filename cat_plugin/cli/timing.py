"""Latency of one way to run a model, measured in a process of its own so that no other runtime is in its way.

``python -m cat_plugin.cli.timing`` reads what to measure as JSON from standard input and writes the times as JSON to
standard output; :func:`measure` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cat_plugin.errors import CATError

__all__ = ["latency", "measure"]

_WARM_UP, _LEAST_CALLS = 5, 20


def latency(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Time a call again and again.

    Parameters
    ----------
    call : callable
        Takes no arguments.
    seconds : float
        How long to go on; there are 20 calls at least.

    Returns
    -------
    dict
        ``median_ms``, ``p10_ms``, ``p90_ms`` and the number of ``calls``.
    """
    for _ in range(_WARM_UP):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p10, median, p90 = np.percentile(np.array(times) * 1e3, [10, 50, 90]).tolist()
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "calls": len(times)}


def _inputs(signature: Sequence[dict[str, Any]], batch: int) -> list[np.ndarray]:
    """Standard normal inputs (zeros where a model takes integers) of the described shapes."""
    draw = np.random.default_rng(0)
    arrays = []
    for entry in signature:
        shape = [batch if isinstance(extent, str) else int(extent) for extent in entry["shape"]]
        dtype = np.dtype(entry["dtype"])
        normal = draw.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
        # The arrays are allocated at a page's boundary, which runtimes use in place.
        arrays.append(normal.astype(dtype))
    return arrays


def _library(job: dict[str, Any]) -> tuple[Callable[..., Any], list[dict[str, Any]]]:
    import tvm_backend

    library = tvm_backend.load(job["path"])
    return library, library.manifest["inputs"]


def _torch_call(model: Any, count: int | None = None, names: Sequence[str] = ()) -> Callable[..., Any]:
    """The model as a function of tensors, of which the first `count` are given by place and the others by name."""
    import torch

    def call(*arrays: Any) -> Any:
        with torch.inference_mode():
            return model(*arrays[:count], **dict(zip(names, arrays[count:], strict=True) if names else ()))

    return call


def _bundle(job: dict[str, Any]) -> tuple[Callable[..., Any], list[dict[str, Any]]]:
    from cat_plugin.graph.bundle import read_bundle

    bundle = read_bundle(job["path"])
    program = bundle.program()
    by_place, by_name = program.call_spec.in_spec.children()
    count = len(by_place.children())
    return _torch_call(program.module(), count, by_name.context), bundle.manifest["inputs"]


def _float(job: dict[str, Any]) -> tuple[Callable[..., Any], list[dict[str, Any]]]:
    from pathlib import Path

    from cat_plugin.cli.models import load_model

    weights = None if job["weights"] is None else Path(job["weights"])
    return _torch_call(load_model(job["model"], weights, job["num_classes"])), job["inputs"]


_RUNTIMES = {"library": _library, "bundle": _bundle, "float": _float}


def _main() -> int:
    job = json.load(sys.stdin)
    try:
        call, signature = _RUNTIMES[job["runtime"]](job)
        rows = []
        for batch in job["batches"]:
            arrays: list[Any] = _inputs(signature, batch)
            if job["runtime"] != "library":
                import torch

                arrays = [torch.from_numpy(array) for array in arrays]
            rows.append({"batch": batch, **latency(lambda given=arrays: call(*given), job["seconds"])})  # type: ignore[misc]
        answer: dict[str, Any] = {"rows": rows}
    except CATError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def measure(job: dict[str, Any], threads: int | None = None) -> list[dict[str, Any]]:
    """Measure in a new process.

    Parameters
    ----------
    job : dict
        ``runtime`` (``library``, ``bundle`` or ``float``), ``batches``, ``seconds`` for each batch size, and ``path``, or
        ``model``, ``weights``, ``num_classes`` and ``inputs``.
    threads : int, optional
        Threads of TVM, OpenMP and PyTorch.

    Returns
    -------
    list of dict
        One for each batch size: ``batch`` and what :func:`latency` returns.

    Raises
    ------
    CATError
        When it cannot be measured; the message is that of the process.
    """
    environment = dict(os.environ)
    # Spinning threads of OpenMP cost a factor of ten on machines with few cores.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "TVM_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, "-m", "cat_plugin.cli.timing"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CATError(f"the latency of the {job['runtime']} cannot be measured: {last}") from None
    if "error" in answer:
        raise CATError(f"the latency of the {job['runtime']} cannot be measured: {answer['error']}")
    rows: list[dict[str, Any]] = answer["rows"]
    return rows


if __name__ == "__main__":
    sys.exit(_main())
