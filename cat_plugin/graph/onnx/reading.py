"""ONNX files read as torch modules, compared with ONNX Runtime before they are handed out."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cat_plugin.errors import CATValueError
from cat_plugin.graph.onnx.files import need, read_model
from cat_plugin.graph.onnx.imported import OnnxModule
from cat_plugin.graph.onnx.operators import OPERATORS, Step
from cat_plugin.graph.onnx.sessions import session_of, showing

__all__ = ["load_onnx"]

_log = logging.getLogger("cat_plugin")

#: Opsets of the standard operators that can be read.
_OPSETS = range(7, 26)
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


def load_onnx(
    path: str | os.PathLike[str],
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    logits: bool = False,
    verify: bool = True,
) -> torch.nn.Module:
    """Read an ONNX file as a torch module that can be quantized.

    Parameters
    ----------
    path : path
        A full-precision model of the standard operators, opset 7 to 25.
    input_shapes : mapping of str to sequence of int, optional
        Shape of each input without the batch, to compare with, where the file leaves sizes open and not every size
        is possible.
    logits : bool, default False
        True: leave out a Softmax that the graph ends with, so that the module gives the logits that a correction
        works on.
    verify : bool, default True
        Whether the module is compared with ONNX Runtime on random inputs, at two batch sizes.

    Returns
    -------
    torch.nn.Module
        In evaluation mode. Takes the file's inputs in their order, gives its output or a tuple of them; any batch size,
        also where the file declares a batch of one.

    Raises
    ------
    CATValueError
        When the file cannot be read, an operator is not known (it is named, with its node), the batch size is fixed, or
        the module gives something else than ONNX Runtime (the first node that differs is named).

    Examples
    --------
    >>> network = cat_plugin.load_onnx("net.onnx", logits=True)  # doctest: +SKIP
    >>> quantized, report = cat_plugin.ptq.quantize(network, QuantSpec(w_bits=4), batches)  # doctest: +SKIP
    """
    model = read_model(path)
    if logits:
        model = _without_softmax(model)
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset not in _OPSETS:
        raise CATValueError(
            f"{path} has opset {opset} of the standard operators; expected {_OPSETS[0]} to {_OPSETS[-1]}, convert it with "
            "onnx.version_converter"
        )
    inputs = _inputs(model)
    batch = inputs[0].shape[0] if inputs[0].shape else None
    fixed = batch if isinstance(batch, int) else None
    steps = [_step(node, opset, fixed) for node in model.graph.node]
    unknown = [
        step
        for step in steps
        if step.op not in OPERATORS and step.op not in ("Constant", "Range", "ConstantOfShape")
    ]
    if unknown:
        kinds = sorted({step.op for step in unknown})
        raise CATValueError(
            f"{path} has operators that are not known: {', '.join(kinds)} (the first is node {unknown[0].name!r}); give a "
            "file without them, or cut the model before them"
        )
    numpy_helper = need("onnx").numpy_helper
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    module = OnnxModule(
        steps, constants, [each.name for each in inputs], [each.name for each in model.graph.output]
    )
    if verify:
        _verify(module, model, inputs, dict(input_shapes or {}), fixed)
    return module.eval()


@dataclass(frozen=True)
class _Input:
    """An input of the graph: sizes that are not known are None."""

    name: str
    kind: int
    shape: tuple[int | None, ...]


def _inputs(model: Any) -> list[_Input]:
    held = {each.name for each in model.graph.initializer}
    found = []
    for each in model.graph.input:
        if each.name in held:
            continue
        tensor = each.type.tensor_type
        shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
        found.append(_Input(each.name, tensor.elem_type, shape))
    if not found:
        raise CATValueError("the ONNX model has no inputs; expected a network")
    return found


def _step(node: Any, opset: int, fixed: int | None) -> Step:
    onnx = need("onnx")
    name = node.name or (node.output[0] if node.output else node.op_type)
    if node.domain not in ("", "ai.onnx"):
        raise CATValueError(
            f"node {name!r} is of the operator {node.domain}.{node.op_type}; expected standard operators alone, export "
            "the model without fused ones"
        )
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value)
        attributes[attribute.name] = value
    return Step(node.op_type, name, tuple(node.input), tuple(node.output), attributes, opset, fixed)


def _without_softmax(model: Any) -> Any:
    """The model up to what goes into its last Softmax, where it ends with one."""
    from cat_plugin.graph.onnx.sessions import OnnxClassifier

    classifier = OnnxClassifier(model, model.graph.output[0].name)
    if classifier.softmax is None:
        return model
    onnx = need("onnx")
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    makers = {name: node for node in cut.graph.node for name in node.output}
    last = makers[classifier.output]
    while last.op_type == "Identity":
        cut.graph.node.remove(last)
        last = makers[last.input[0]]
    cut.graph.node.remove(last)
    cut.graph.output[0].name = classifier.logits
    _log.info("left out the Softmax that the model ends with (node %r)", last.name or last.output[0])
    return cut


def _random(given: _Input, shape: Sequence[int], seed: int, most: int) -> np.ndarray[Any, Any]:
    """Values that fit the type of an input; integers below `most`."""
    dtype = need("onnx").helper.tensor_dtype_to_np_dtype(given.kind)
    generator = np.random.default_rng(seed)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2 if dtype.kind == "b" else most, shape).astype(dtype)


def _shapes(inputs: list[_Input], given: dict[str, Sequence[int]]) -> list[dict[str, list[int]]]:
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


def _verify(
    module: OnnxModule, model: Any, inputs: list[_Input], given: dict[str, Sequence[int]], fixed: int | None
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

    def keep(step: Step, result: Any) -> None:
        for name, part in zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False):
            if isinstance(part, torch.Tensor):
                values[name] = part.numpy()
                made.append((step, name))

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
