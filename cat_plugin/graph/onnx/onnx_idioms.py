"""Activations that a graph spells out in arithmetic, written as the one operator that they are.

Left in pieces, each piece would be quantized by itself, and what is far from linear suffers: the cube inside a GELU needs a
range so wide that 8 bits hold nothing of its middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.errors import CATError
from cat_plugin.graph.onnx.operators import OPERATORS, Known, Step, Value, to_tensor

__all__ = ["whole_activations"]

_PIECES = {"Add", "Sub", "Mul", "Div", "Neg", "Pow", "Tanh", "Erf", "Sigmoid", "Clip", "Relu", "Exp", "Log", "Reciprocal", "Identity"}  # fmt: skip
_ENDS = {"Mul", "Div", "Clip"}
#: Longest way back from the end that is looked at; a GELU of single products has ten steps.
_MOST = 14
#: What the pieces may be, by operator and attributes.
_WHOLE: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("Gelu", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("Gelu", {"approximate": "none"}, F.gelu),
    ("HardSwish", {}, F.hardswish),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid),
    ("Mish", {}, F.mish),
]
# Constants of files are float32; the two GELUs are 5e-4 apart, other functions by more.
_TOLERANCE = 1e-5


def whole_activations(steps: list[Step], known: dict[str, Known], outputs: set[str]) -> list[Step]:
    """Find activations by what they compute: groups of steps of one tensor and single numbers, tried on points.

    Parameters
    ----------
    steps : list of Step
        Of the graph, in order.
    known : dict of str to Known
        Constants.
    outputs : set of str
        Outputs of the graph, which stay.

    Returns
    -------
    list of Step
        With one step for each group whose values are those of an activation, without what nothing reads any more.
    """
    makers = {name: step for step in steps for name in step.outputs}
    points = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    wanted = [(op, attributes, function(points)) for op, attributes, function in _WHOLE]
    result = []
    found = False
    for step in steps:
        whole = None
        if step.op in _ENDS:
            for source, group in _groups(step, makers, known):
                values = _values(group, source, points, known)
                whole = None if values is None else _named(values, wanted)
                if whole is not None:
                    op, attributes = whole
                    step = replace(step, op=op, inputs=(source,), attributes=attributes)
                    found = True
                    break
        result.append(step)
    return _read(result, outputs) if found else result


def _groups(end: Step, makers: dict[str, Step], known: dict[str, Known]) -> Iterator[tuple[str, list[Step]]]:
    """Each tensor that everything in front of a step comes from, with the steps from there on, in order."""
    behind: list[Step] = []
    waiting = [end]
    tensors: dict[str, None] = {}
    while waiting and len(behind) < _MOST:
        step = waiting.pop(0)
        if any(step is each for each in behind):
            continue
        behind.append(step)
        for name in step.inputs:
            if name and name not in known:
                tensors[name] = None
                maker = makers.get(name)
                if maker is not None and maker.op in _PIECES:
                    waiting.append(maker)
    for source in tensors:
        group = _between(end, source, makers, known)
        if group is not None and len(group) > 1:
            yield source, group


def _between(end: Step, source: str, makers: dict[str, Step], known: dict[str, Known]) -> list[Step] | None:
    """The steps from a tensor to the end; None where another tensor, or more than single numbers, comes in."""
    order: list[Step] = []

    def visit(step: Step) -> bool:
        if any(step is each for each in order):
            return True
        if step.op not in _PIECES or len(order) >= _MOST:
            return False
        for name in step.inputs:
            if not name or name == source:
                continue
            if name in known:
                if known[name].array.size != 1:
                    return False
            elif name not in makers or not visit(makers[name]):
                return False
        order.append(step)
        return True

    return order if visit(end) else None


def _values(group: list[Step], source: str, points: Tensor, known: dict[str, Known]) -> Tensor | None:
    """What a group makes of points."""
    values: dict[str, Value] = {"": None, source: points, **{name: known[name] for step in group for name in step.inputs if name in known}}  # fmt: skip
    try:
        for step in group:
            given = [values[name] for name in step.inputs]
            values[step.outputs[0]] = OPERATORS[step.op](step, *given)
    except (CATError, RuntimeError, TypeError):
        return None
    made = to_tensor(values[group[-1].outputs[0]])
    return made.double() if made.numel() == points.numel() else None


def _named(
    values: Tensor, wanted: list[tuple[str, dict[str, Any], Tensor]]
) -> tuple[str, dict[str, Any]] | None:
    for op, attributes, expected in wanted:
        if float((values.reshape(-1) - expected).abs().max()) < _TOLERANCE:
            return op, attributes
    return None


def _read(steps: list[Step], outputs: set[str]) -> list[Step]:
    """The steps whose results something reads."""
    readers = Counter(name for step in steps for name in step.inputs)
    kept = []
    for step in reversed(steps):
        if any(readers[name] or name in outputs for name in step.outputs):
            kept.append(step)
            continue
        readers.subtract(step.inputs)
    return kept[::-1]
