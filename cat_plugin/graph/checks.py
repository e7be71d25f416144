"""A few inputs of a model with the outputs that belong to them, by which whoever runs the model checks it.

The file is read without PyTorch.  How far outputs may lie apart stands in it: sums in another order can put a value on the
other side of the edge between two quantization levels, and what that does to the outputs differs from network to network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from cat_plugin.errors import CATError
from cat_plugin.graph.arrays import array_bytes

__all__ = ["Checks", "Run", "row_distances"]

Arrays = tuple[np.ndarray[Any, Any], ...]
_FORMAT = "cat-checks 1"
_FOR_A_MEDIAN = 3


@dataclass(frozen=True)
class Run:
    """One call of the model.

    Attributes
    ----------
    inputs, outputs : tuple of numpy.ndarray
        In the order of the model's signature.
    """

    inputs: Arrays
    outputs: Arrays

    def __len__(self) -> int:
        """Rows of the batch."""
        return len(self.inputs[0]) if self.inputs and self.inputs[0].ndim else 1


@dataclass(frozen=True)
class Checks:
    """Calls of the model and how far another implementation's outputs may lie from these.

    Attributes
    ----------
    runs : tuple of Run
        Of one row and of all rows, where the batch size is free.
    typical : float
        Bound of the median row, as a share of the largest output.
    worst : float
        Bound of every row.
    """

    runs: tuple[Run, ...]
    typical: float
    worst: float

    def fault(self, call: Callable[..., Any]) -> str | None:
        """Run an implementation on the stored inputs.

        Parameters
        ----------
        call : callable
            Takes the inputs of a run, and returns an array or a tuple of arrays.

        Returns
        -------
        str or None
            What is wrong: which rows, by how much, and the bounds.  None where nothing is.
        """
        found = []
        for run in self.runs:
            given = call(*(_aligned(each) for each in run.inputs))
            outputs = tuple(map(np.asarray, given if isinstance(given, tuple | list) else (given,)))
            shapes = [[each.shape for each in kind] for kind in (outputs, run.outputs)]
            if shapes[0] != shapes[1]:
                return f"{len(run)} row(s) give outputs of shape {shapes[0]}; expected {shapes[1]}"
            found.append(outputs)
        rows = row_distances(found, [run.outputs for run in self.runs])
        middle = float(np.sort(rows)[(len(rows) - 1) // 2])
        # A single row or two may have met an edge between two levels: then their median says nothing.
        if rows.max() <= self.worst and (middle <= self.typical or len(rows) < _FOR_A_MEDIAN):
            return None
        off = ", ".join(f"{i} ({rows[i]:.2g})" for i in np.flatnonzero(rows > min(self.typical, self.worst)))
        return (
            f"rows {off} of {len(rows)} are this share of the largest output away; expected at most {self.typical:.2g} for the "
            f"median row and {self.worst:.2g} for every row"
        )

    def rows_are_independent(self) -> bool:
        """Return whether the first row gives the same alone as among all, so that a batch may be run in pieces.

        Batch statistics at inference, for one, make rows depend on each other.  Unknown where there is one run only, which
        counts as no.
        """
        if len(self.runs) < 2:
            return False
        alone, among = self.runs[:2]
        if any(not each.ndim or not len(each) for each in (*alone.outputs, *among.outputs)):
            return False
        first = [tuple(each[:1] for each in run.outputs) for run in (alone, among)]
        return float(row_distances(first[:1], first[1:]).max()) <= self.typical

    def to_bytes(self) -> bytes:
        """Return the file's contents."""
        arrays = {
            f"{number}.{kind}.{i}": array
            for number, run in enumerate(self.runs)
            for kind, values in (("input", run.inputs), ("output", run.outputs))
            for i, array in enumerate(values)
        }
        return array_bytes(
            arrays, {"format": _FORMAT, "typical": repr(self.typical), "worst": repr(self.worst)}
        )

    def digest(self) -> str:
        """Return the sha256 of :meth:`to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def read(cls, stream: IO[bytes], path: Path, kind: type[CATError], remedy: str) -> Checks:
        """Read a file, compared with its sha256 before.

        Parameters
        ----------
        stream : binary file
            At its beginning.
        path : pathlib.Path
            For messages.
        kind : subclass of CATError
            What to raise.
        remedy : str
            What the user can do.

        Raises
        ------
        CATError
            The file holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        data = stream.read()
        try:
            arrays: Mapping[str, np.ndarray[Any, Any]] = load(data)
            facts = _metadata(data)
            if facts["format"] != _FORMAT:
                raise ValueError(f"its format is {facts['format']!r:.40}")
            typical, worst = float(facts["typical"]), float(facts["worst"])
            runs: list[Run] = []
            while f"{len(runs)}.output.0" in arrays:
                runs.append(
                    Run(_numbered(arrays, len(runs), "input"), _numbered(arrays, len(runs), "output"))
                )
            count = sum(len(run.inputs) + len(run.outputs) for run in runs)
            if not runs or count != len(arrays) or not (0 <= typical < np.inf and 0 <= worst < np.inf):
                raise ValueError("its arrays or bounds are not what belongs there")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise kind(f"{path} is no file of inputs and outputs for checks ({error}): {remedy}") from error
        return cls(tuple(runs), typical, worst)


def _metadata(data: bytes) -> dict[str, str]:
    import json

    size = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + size])["__metadata__"])


def _numbered(arrays: Mapping[str, np.ndarray[Any, Any]], run: int, kind: str) -> Arrays:
    found: list[np.ndarray[Any, Any]] = []
    while f"{run}.{kind}.{len(found)}" in arrays:
        found.append(arrays[f"{run}.{kind}.{len(found)}"])
    return tuple(found)


def _aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array(array, order="C")  # of its own memory, which whoever is called may write to


def row_distances(found: Sequence[Arrays], expected: Sequence[Arrays]) -> np.ndarray[Any, Any]:
    """Distance of each row's outputs, the largest over outputs and runs.

    Parameters
    ----------
    found, expected : sequence of tuple of numpy.ndarray
        The outputs of each run, of equal shapes.

    Returns
    -------
    numpy.ndarray of shape (rows,), float64
        As a share of the largest magnitude that the output has anywhere; infinite where one of two is no number.
    """
    rows = np.zeros(max((len(each[0]) if each[0].ndim else 1) for each in expected))
    for index in range(len(expected[0])):
        wanted = [np.asarray(run[index], np.float64) for run in expected]
        finite = [np.abs(each[np.isfinite(each)]) for each in wanted]
        scale = max([1e-6, *(float(each.max()) for each in finite if each.size)])
        for got, want in zip((run[index] for run in found), wanted, strict=True):
            with np.errstate(invalid="ignore"):
                apart = np.abs(np.asarray(got, np.float64) - want) / scale
            same = (got == want) | (np.isnan(got) & np.isnan(want))
            apart = np.where(same, 0.0, np.nan_to_num(apart, nan=np.inf))
            by_row = apart.reshape(len(want) if want.ndim else 1, -1).max(axis=1, initial=0.0)
            if len(by_row) <= len(rows):
                rows[: len(by_row)] = np.maximum(rows[: len(by_row)], by_row)
            else:  # an output whose first axis is not the batch's
                rows = np.maximum(rows, by_row.max())
    return rows
