"""A written ONNX model compared with the program it was written from, operation by operation, before the file is kept.

Rounding would hide faults in a comparison of outputs alone: a value half way between two integers may fall to either side,
and in a network of few bits the difference grows from layer to layer.  So each operation of the program is given the
values that ONNX Runtime computed in front of it, and what it makes of them is compared with ONNX Runtime's.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from cat_plugin.batches import read_batch
from cat_plugin.errors import CATValueError, ExportError
from cat_plugin.graph.onnx.files import need
from cat_plugin.graph.onnx.sessions import session_of, showing
from cat_plugin.graph.onnx.writer import Writer, arguments_of, place_of

__all__ = ["check_written"]

_log = logging.getLogger("cat_plugin")

#: Share of the largest value of a result by which sums in another order may differ.
_TOLERANCE = 1e-3
#: A rounded value is at most half a step away from what it was; the slack is for float32's division.
_HALF_STEP = 0.51
_ROWS = (1, 3)
#: Shares of the norm of the outputs: integer kernels round once more, up to a few per cent. What is beyond the first is
#: told of, what is beyond the second is no rounding.
_KERNELS_TELL, _KERNELS_REFUSE = 0.1, 0.5


def check_written(
    writer: Writer, model: Any, path: str | os.PathLike[str], example_inputs: Any = None
) -> None:
    """Compare an ONNX model with its program in ONNX Runtime, at two batch sizes, where ONNX Runtime is installed.

    Parameters
    ----------
    writer : Writer
        Holds the program and the names that its operations have in the model.
    model : onnx.ModelProto
        What was written of it.
    path : path
        The file that is to be written, for messages.
    example_inputs : tensor or tuple of tensors, optional
        Rows to compare on; random values of the program's shapes where there are none.

    Raises
    ------
    ExportError
        When a result differs by more than rounding, naming the file and the first operation; or when the outputs under
        ONNX Runtime's default optimizations are not those of the nodes, beyond what integer kernels round.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        _log.info("%s is not compared with its program: onnxruntime is not installed", path)
        return
    produced = {name for node in model.graph.node for name in node.output}
    names = {
        node: name
        for node, name in writer.names.items()
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), Tensor)
        and not _quantizes(node)
        and name in produced
    }
    outputs = [each.name for each in model.graph.output]
    shown = list(dict.fromkeys([*names.values(), *outputs]))
    try:
        session = session_of(showing(model, shown), optimized=False)
    except CATValueError as error:
        _log.warning("%s is not compared with its program: %s", path, error)
        return
    optimized = _optimized(model, path)
    for inputs in _batches(writer, example_inputs):
        feed = {each.name: x.numpy() for each, x in zip(model.graph.input, inputs, strict=True)}
        try:
            theirs = dict(zip(shown, session.run(shown, feed), strict=True))
        except Exception as error:  # its exceptions share no base class
            rows = len(inputs[0]) if inputs else 0
            raise ExportError(
                f"ONNX Runtime cannot run what was written for {rows} rows: {error}; a size that the model takes for a number "
                "has become the batch of the example, or report it with the model"
            ) from error
        _OnTheirValues(writer, {node: theirs[name] for node, name in names.items()}, str(path)).run_on(inputs)
        if optimized is not None:
            _compare_optimized(optimized, feed, {name: theirs[name] for name in outputs}, path)


def _optimized(model: Any, path: Any) -> Any:
    try:
        return session_of(model)
    except CATValueError as error:
        _log.warning("%s cannot be run with ONNX Runtime's default optimizations: %s", path, error)
        return None


def _compare_optimized(session: Any, feed: dict[str, Any], expected: dict[str, Any], path: Any) -> None:
    version = need("onnxruntime").__version__
    try:
        results = session.run(list(expected), feed)
    except Exception as error:  # its exceptions share no base class
        _log.warning("ONNX Runtime %s fails on %s with its default optimizations: %s", version, path, error)
        return
    for (name, wanted), got in zip(expected.items(), results, strict=True):
        if np.asarray(wanted).dtype.kind != "f":
            continue
        same = got.shape == wanted.shape and np.array_equal(np.isfinite(got), np.isfinite(wanted))
        finite = np.isfinite(wanted)
        norm = float(np.linalg.norm(wanted[finite])) or 1.0
        share = float(np.linalg.norm(got[finite] - wanted[finite])) / norm if same else float("inf")
        what = (
            f"with its default optimizations ONNX Runtime {version} computes {share:.0%} (of the norm of {name!r}) "
            f"away from the nodes of {path}"
        )
        if share > _KERNELS_REFUSE:
            raise ExportError(f"{what}; integer kernels round by a few per cent. Report it with the model")
        if share > _KERNELS_TELL:
            _log.warning("%s; compare its accuracy, or run it with ORT_DISABLE_ALL", what)


def _batches(writer: Writer, example_inputs: Any) -> list[list[Tensor]]:
    """Inputs at each batch size: rows of the examples, or random ones that the program takes."""
    if example_inputs is not None:
        given = _given(writer, example_inputs)
        return [[x[torch.arange(rows) % len(x)].contiguous() for x in given] for rows in _ROWS]
    wanted = [
        node.meta["val"] for node in writer.names if node.op == "placeholder" and _is_input(writer, node)
    ]
    generator = torch.Generator().manual_seed(0)
    # Integers may be indices: into bytes or words as a rule, at least into a table of two.
    for most in (256, 2):
        batches = [[_random(value, rows, most, generator) for value in wanted] for rows in _ROWS]
        try:
            for inputs in batches:
                _OnTheirValues(writer, {}, "").run_on(inputs)
        except IndexError:
            continue
        return batches
    return []


def _given(writer: Writer, example_inputs: Any) -> list[Tensor]:
    """The examples in the order of the program's inputs: all of them, or a batch as the calibration's."""
    names = [node.name for node in writer.names if node.op == "placeholder" and _is_input(writer, node)]
    if isinstance(example_inputs, tuple) and len(example_inputs) == len(names) > 1:
        tensors = [torch.as_tensor(each) for each in example_inputs]
    elif isinstance(example_inputs, Mapping) and set(example_inputs) == set(names):
        tensors = [torch.as_tensor(example_inputs[name]) for name in names]
    else:
        tensors = read_batch(example_inputs, "example_inputs").tensors
    if len(tensors) != len(names):
        raise CATValueError(
            f"example_inputs holds {len(tensors)} tensors; expected {len(names)}: {', '.join(names)}"
        )
    return tensors


def _is_input(writer: Writer, node: fx.Node) -> bool:
    specs = writer.program.graph_signature.input_specs
    return any(spec.kind is InputKind.USER_INPUT and spec.arg.name == node.name for spec in specs)


def _random(value: Tensor, rows: int, most: int, generator: torch.Generator) -> Tensor:
    shape = [size if isinstance(size, int) else rows for size in value.shape]
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.randint(2 if value.dtype is torch.bool else most, shape, generator=generator).to(value.dtype)


def _quantizes(node: fx.Node) -> bool:
    return str(node.target).startswith("quantized_decomposed.quantize")


class _OnTheirValues(fx.Interpreter):
    """Runs a program, compares each result with the other runtime's and goes on with the latter.

    Quantized values are compared where they are dequantized: they must be within half a step of what was quantized.
    """

    def __init__(self, writer: Writer, theirs: dict[fx.Node, np.ndarray[Any, Any]], path: str) -> None:
        super().__init__(writer.program.graph_module)
        self.extra_traceback = False
        self.writer, self.theirs, self.path = writer, theirs, path
        self._before: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_on(self, inputs: list[Tensor]) -> None:
        """Run on one batch.

        Raises
        ------
        ExportError
            When a result differs.
        """
        left = iter(inputs)
        program = self.writer.program
        held = {**program.constants, **program.state_dict}
        given = [
            next(left) if spec.kind is InputKind.USER_INPUT else held.get(str(spec.target))
            for spec in program.graph_signature.input_specs
        ]
        with torch.no_grad():
            self.run(*given)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _quantizes(n):
            self._before[n] = self._unrounded(n)
        if n not in self.theirs or not isinstance(value, Tensor):
            return value
        found = torch.from_numpy(np.asarray(self.theirs[n]).copy())
        if found.shape != value.shape:
            raise self._different(n, f"shape {tuple(found.shape)} where {tuple(value.shape)} is expected")
        source = n.args[0] if n.args else None
        expected, step = (
            self._before.get(source, (value, None)) if isinstance(source, fx.Node) else (value, None)
        )
        off = _off(found, expected, step)
        if off > 1:
            raise self._different(n, f"{off:.2g} times as far away as rounding is")
        return found.to(value.dtype)

    def _unrounded(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """What a quantize operation rounds, clipped to its range and in the input's units; and its step."""
        given: Any = self.map_nodes_to_values(arguments_of(node), node)
        x = given["input"].double()
        scale = torch.as_tensor(given.get("scale", given.get("scales")), dtype=torch.float64)
        zero = given.get("zero_point", given.get("zero_points"))
        zero = torch.as_tensor(0 if zero is None else zero, dtype=torch.float64)
        if "axis" in given:
            shape = [1] * x.ndim
            shape[given["axis"]] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
        unrounded = (x / scale + zero).clamp(given["quant_min"], given["quant_max"])
        return (unrounded - zero) * scale, scale

    def _different(self, node: fx.Node, what: str) -> ExportError:
        return ExportError(
            f"{self.path} would not compute what the module does: the first result that ONNX Runtime has otherwise is "
            f"that of {node.target} in {place_of(node)} (node {self.writer.names[node]!r} of the file), {what}. This is "
            "a fault of this package, not of the model: please report it with the model's code."
        )


def _off(found: Tensor, expected: Tensor, step: Tensor | None) -> float:
    """Largest difference in units of what rounding explains; infinite where non-finite values differ."""
    if not expected.numel():
        return 0.0
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(found.to(expected.dtype), expected) else float("inf")
    mine, theirs = expected.double(), found.double()
    finite = torch.isfinite(mine)
    if not torch.equal(finite, torch.isfinite(theirs)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    apart = torch.where(finite, (mine - theirs).abs(), 0.0)
    if step is not None:
        return float((apart / (step * _HALF_STEP)).max())
    return float(apart.max()) / (_TOLERANCE * max(1e-6, float(mine[finite].abs().max())))
