"""Whole models on a CUDA device for :mod:`benchmarks.cuda`: verified on the rows that travel with them, then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Model", "checked", "median", "time_all"]

Keep = Callable[[dict[str, Any]], None]
_LAUNCHES = 20


def median(function: Callable[[int], Any], synchronize: Callable[[], Any], repeats: int) -> float:
    """Median time of a launch in microseconds: batches of launches between two synchronizations; of one launch for no repeats."""
    launches = _LAUNCHES if repeats else 1
    for i in range(3 if repeats else 0):
        function(i)
    synchronize()
    samples = []
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        for i in range(launches):
            function(i)
        synchronize()
        samples.append((time.perf_counter() - start) / launches * 1e6)
    return statistics.median(samples)


@dataclass
class Model:
    """A model at one batch size.

    Attributes
    ----------
    path : pathlib.Path
        The library.
    row : dict
        Of the results.
    data : ndarray
        Inputs.
    graphs : bool
        Whether its graphs could be captured.
    """

    path: Path
    row: dict[str, Any]
    data: np.ndarray[Any, Any]
    graphs: bool = True


def checked(path: Path, name: str, keep: Keep) -> list[Model]:
    """Run a library on the rows that travel with it, as it was stored and repeated to each of its batch sizes.

    Parameters
    ----------
    path
        The library.
    name
        Of the model.
    keep
        Takes the rows of the results.
    """
    try:
        return _checked(path, name, keep)
    except Exception as error:
        fault = f"with graphs: {error!r}"[:400]
    print(f"{name:<44} {fault}", flush=True)
    keep({"name": name, "kind": "model", "correct": False, "fault": fault})
    try:
        with _Launching(False):
            models = _checked(path, name, keep)
    except Exception as error:
        keep({"name": name, "kind": "model", "correct": False, "fault": f"without graphs: {error!r}"[:400]})
        return []
    for model in models:
        model.graphs = False
    return models


def _checked(path: Path, name: str, keep: Keep) -> list[Model]:
    import tvm_backend
    from cat_plugin.errors import LibraryError
    from cat_plugin.graph.checks import Checks, Run
    from tvm_backend.verify import read_checks, verify

    library = tvm_backend.load(path)
    checks = read_checks(library.manifest, path)
    whole = max(checks.runs, key=len)
    faults: dict[int, str | None] = {}
    try:
        verify(library)
        fault = None
    except LibraryError as error:
        fault = str(error)
    made = []
    for batch in library.manifest["batch_sizes"]:
        rows = np.arange(batch) % len(whole)
        run = Run(*(tuple(array[rows] for array in arrays) for arrays in (whole.inputs, whole.outputs)))
        # The second call is the first that launches a graph.
        faults[batch] = fault or Checks((run, run), checks.typical, checks.worst).fault(library.flat)
        row = {
            "name": f"{name}, N {batch}",
            "kind": "model",
            "correct": faults[batch] is None,
            "fault": faults[batch],
        }
        keep(row)
        print(f"{row['name']:<44} {faults[batch] or 'verified'}", flush=True)
        made.append(Model(path, row, run.inputs[0]))
    return made


def time_all(models: Sequence[Model], tvm: Any, device: Any, graphs: bool, repeats: int, keep: Keep) -> None:
    """Time each model, inputs and results on the device, with one graph a call or launch by launch."""
    import tvm_backend

    key = "microseconds" if graphs else "launched_microseconds"
    library, loaded = None, None
    with _Launching(graphs):
        for model in models:
            if graphs and not model.graphs:
                continue
            if model.path != loaded:
                library, loaded = tvm_backend.load(model.path), model.path
            tensor = tvm.runtime.tensor(model.data, device)
            model.row[key] = median(lambda _, run=library, x=tensor: run(x), device.sync, repeats)
            keep(model.row)
            print(f"{model.row['name']:<44} {key:<22} {model.row[key]:>9.1f}", flush=True)


class _Launching:
    """While it lasts, libraries that are loaded launch a captured graph, or each kernel by itself."""

    _NAME = "vm.builtin.cuda_graph.run_or_capture"

    def __init__(self, graphs: bool) -> None:
        self.graphs = graphs

    def __enter__(self) -> None:
        import tvm_ffi

        self._real = tvm_ffi.get_global_func(self._NAME)
        if not self.graphs:
            invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")
            tvm_ffi.register_global_func(
                self._NAME,
                lambda machine, function, given, *_: invoke(machine, function, *given),
                override=True,
            )

    def __exit__(self, *_: object) -> None:
        import tvm_ffi

        tvm_ffi.register_global_func(self._NAME, self._real, override=True)
