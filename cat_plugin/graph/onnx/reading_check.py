"""A module read from an ONNX file compared with ONNX Runtime, before it is handed out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cat_plugin.errors import CATValueError
from cat_plugin.graph.onnx.files import need
from cat_plugin.graph.onnx.imported import OnnxModule
from cat_plugin.graph.onnx.onnx_quantized import WEIGHT, unrounded
from cat_plugin.graph.onnx.operators import Step, Value
from cat_plugin.graph.onnx.sessions import session_of, showing

__all__ = ["Input", "verify_module"]

#: What is tried for sizes that the file leaves open, in this order.
_TRIED = (64, 32, 48, 96, 128, 224, 256, 320, 16, 8, 512)
_BATCHES = (2, 3)
#: Largest difference to ONNX Runtime, relative to the largest value: rounding in another order gives 1e-6 to 1e-4.
_TOLERANCE = 1e-3
#: Where the function itself multiplies rounding, as a norm of nearly constant values does, float32 is so far from float64:
#: that many times this is allowed.
_ROUNDINGS = 20
_MOST = (256, 2)
_BOUNDED = ("Sigmoid", "Softmax")


@dataclass(frozen=True)
class Input:
    """An input of the graph: sizes that are not known are None."""

    name: str
    kind: int
    shape: tuple[int | None, ...]


def _random(given: Input, shape: Sequence[int], seed: int, most: int) -> np.ndarray[Any, Any]:
    """Values that fit the type of an input; integers below `most`."""
    dtype = need("onnx").helper.tensor_dtype_to_np_dtype(given.kind)
    generator = np.random.default_rng(seed)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2 if dtype.kind == "b" else most, shape).astype(dtype)


def _shapes(inputs: list[Input], given: dict[str, Sequence[int]]) -> list[dict[str, list[int]]]:
    """Shapes without the batch to try, in order; one where the file or the caller fixes all sizes."""
    unknown = sorted(set(given) - {each.name for each in inputs})
    if unknown:
        raise CATValueError(
            f"input_shapes names {', '.join(unknown)}; the inputs are {', '.join(each.name for each in inputs)}"
        )
    tried: list[dict[str, list[int]]] = []
    for size in _TRIED:
        shapes = {
            each.name: [int(s) for s in given[each.name]]
            if each.name in given
            else [size if extent is None else extent for extent in each.shape[1:]]
            for each in inputs
        }
        if shapes not in tried:
            tried.append(shapes)
    return tried


def verify_module(
    module: OnnxModule, model: Any, inputs: list[Input], given: dict[str, Sequence[int]], fixed: int | None
) -> None:
    """Compare the module with ONNX Runtime at two batch sizes.

    Raises
    ------
    CATValueError
        When a result differs, or no shape is taken.
    """
    truth = _Truth(model, fixed)
    refused = ""
    # Integers may be indices: into bytes or words as a rule, at least into a table of two.
    for shapes, most in itertools.product(_shapes(inputs, given), _MOST):
        feeds = [
            {
                each.name: _random(each, [rows, *shapes[each.name]], seed, most)
                for seed, each in enumerate(inputs)
            }
            for rows in _BATCHES
        ]
        try:
            expected = [truth(feed) for feed in feeds]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            refused = str(error).partition("\n")[0]
            continue
        for feed, wanted in zip(feeds, expected, strict=True):
            if module.quantized:
                _compare_steps(module, truth, feed)
            else:
                _compare(module, truth, feed, wanted)
        return
    raise CATValueError(
        f"the module cannot be compared with ONNX Runtime, which takes none of the shapes that were tried ({refused}); "
        "give input_shapes, the shape of each input without the batch"
    )


class _Truth:
    """ONNX Runtime's results, of the outputs and of what goes into a bounded function that makes one."""

    def __init__(self, model: Any, fixed: int | None) -> None:
        self.model, self.fixed = model, fixed
        makers = {name: node for node in model.graph.node for name in node.output}
        self.names = [each.name for each in model.graph.output]
        # Of a bounded function the argument says more: its own values may all be next to nothing.
        ends = [makers[name] for name in self.names if name in makers and makers[name].op_type in _BOUNDED]
        self.bounded = {node.output[0] for node in ends}
        self.names += [node.input[0] for node in ends if node.input[0] not in self.names]
        self._session = session_of(showing(model, self.names), optimized=False)

    def off(self, name: str, got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
        """Largest difference, relative to the largest value; infinite where shapes or non-finite values differ."""
        if got.shape != wanted.shape or not np.array_equal(np.isfinite(got), np.isfinite(wanted)):
            return float("inf")
        finite = np.isfinite(wanted)
        if not finite.any():
            return 0.0
        mine, theirs = got[finite].astype(np.float64), wanted[finite].astype(np.float64)
        whole = 1.0 if name in self.bounded else max(1e-6, float(np.abs(theirs).max()))
        return float(np.abs(mine - theirs).max()) / whole

    def __call__(self, feed: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Each compared value of a batch, run row groups at a time where the file declares one batch size."""
        if self.fixed is None:
            return dict(zip(self.names, map(np.asarray, self._session.run(self.names, feed)), strict=True))
        rows = len(next(iter(feed.values())))
        # Repeated up to whole batches: the first rows of what comes out are those that were asked for.
        index = np.arange(-(-rows // self.fixed) * self.fixed) % rows
        groups = [index[start : start + self.fixed] for start in range(0, len(index), self.fixed)]
        parts = [
            self._session.run(self.names, {n: value[group] for n, value in feed.items()}) for group in groups
        ]
        whole = [np.concatenate(each)[:rows] for each in zip(*parts, strict=True)]
        return dict(zip(self.names, whole, strict=True))


def _run(
    module: OnnxModule, feed: dict[str, Any]
) -> tuple[dict[str, np.ndarray[Any, Any]], list[tuple[Step, str]]]:
    """Every tensor that the module computes, by name, and the steps that made them, in order."""
    values: dict[str, np.ndarray[Any, Any]] = {}
    made: list[tuple[Step, str]] = []

    def keep(step: Step, _given: list[Value], result: Any) -> Any:
        for name, part in zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False):
            if isinstance(part, torch.Tensor):
                values[name] = part.numpy()
                made.append((step, name))
        return result

    with torch.no_grad():
        module.run(tuple(torch.from_numpy(value) for value in feed.values()), keep)
    return values, made


def _compare(
    module: OnnxModule, truth: _Truth, feed: dict[str, Any], expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    values, made = _run(module, feed)
    for name, wanted in expected.items():
        got = values.get(name)
        if got is None:  # a constant, or an input as it came
            continue
        difference = truth.off(name, got, wanted)
        if difference <= _TOLERANCE or difference <= _ROUNDINGS * _rounding(module, truth, feed, name, got):
            continue
        shapes = " and ".join(str(tuple(value.shape)) for value in feed.values())
        found = f"{name!r} is {difference:.1e} of its largest value off"
        if got.shape != wanted.shape:
            found = f"{name!r} has shape {got.shape} where {wanted.shape} is expected"
        raise CATValueError(
            f"the module that was read differs from ONNX Runtime on inputs of shape {shapes}: {found}"
            f"{_first_difference(truth, feed, values, made)}; report the operator, or export the model with other ones"
        )


def _compare_steps(module: OnnxModule, truth: _Truth, feed: dict[str, Any]) -> None:
    """Compare each step of a quantized network on ONNX Runtime's values, so that no rounding is carried on.

    A value half way between two integers falls to either side. So integers are compared where they are dequantized, with
    what was quantized: it may be half a step away.
    """
    _, made = _run(module, feed)
    names = [name for step, name in made if step.op not in ("QuantizeLinear", WEIGHT)]
    theirs = _Truth(showing(truth.model, names), truth.fixed)(feed)
    before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    shapes = " and ".join(str(tuple(value.shape)) for value in feed.values())

    def compare(step: Step, given: list[Value], result: Any) -> Any:
        if step.op == "QuantizeLinear":
            before[step.outputs[0]] = unrounded(step, given)
            return result
        parts = list(result) if isinstance(result, tuple) else [result]
        for i, (name, part) in enumerate(zip(step.outputs, parts, strict=False)):
            wanted = theirs.get(name)
            if wanted is None or not isinstance(part, torch.Tensor):
                continue
            if step.op == "DequantizeLinear" and step.inputs[0] in before and part.shape == wanted.shape:
                expected, half = before[step.inputs[0]]
                off = float(((torch.from_numpy(wanted).double() - expected).abs() / half).max())
                right, what = off <= 1, f"{off / 2:.2g} steps off, where half a step is rounding"
            else:
                off = truth.off(name, part.numpy(), wanted)
                right, what = off <= _TOLERANCE, f"{off:.1e} of its largest value off"
            if not right:
                raise CATValueError(
                    f"the module that was read differs from ONNX Runtime on inputs of shape {shapes}: {name!r} is {what} "
                    f"(the first node that differs is {step.name!r}, {step.op}); report the operator, or export the "
                    "model with other ones"
                )
            parts[i] = torch.from_numpy(wanted.copy()).to(part.dtype)
        return tuple(parts) if isinstance(result, tuple) else parts[0]

    with torch.no_grad():
        module.run(tuple(torch.from_numpy(value) for value in feed.values()), compare)


def _rounding(
    module: OnnxModule, truth: _Truth, feed: dict[str, Any], name: str, got: np.ndarray[Any, Any]
) -> float:
    """How far a value in float32 is from the same in float64; 0 where the graph names types of its own."""
    double = copy.deepcopy(module).double()
    wide = {
        key: value.astype(np.float64) if value.dtype.kind == "f" else value for key, value in feed.items()
    }
    try:
        exact, _ = _run(double, wide)
    except CATValueError:
        return 0.0
    return truth.off(name, got, exact[name])


def _first_difference(
    truth: _Truth, feed: dict[str, Any], values: dict[str, np.ndarray[Any, Any]], made: list[tuple[Step, str]]
) -> str:
    """The first node whose result is not ONNX Runtime's, as a part of a sentence."""
    names = list(dict.fromkeys(name for _, name in made))
    try:
        everything = _Truth(showing(truth.model, names), truth.fixed)
        theirs = everything(feed)
    except Exception:  # values of odd types cannot be shown; the message does without
        return ""
    for step, name in made:
        if everything.off(name, values[name], theirs[name]) > _TOLERANCE:
            return f" (the first node that differs is {step.name!r}, {step.op})"
    return ""
