"""An ONNX graph as a torch module: constants as parameters, nodes as steps that call torch."""

from __future__ import annotations

import inspect
import keyword
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cat_plugin.errors import CATError, CATValueError
from cat_plugin.graph.onnx import onnx_elementwise, onnx_known, onnx_layers, onnx_shapes  # noqa: F401
from cat_plugin.graph.onnx.onnx_quantized import WEIGHT, integer_weights, is_weight, with_ranges
from cat_plugin.graph.onnx.onnx_recurrent import parameter_names, recurrent_layers
from cat_plugin.graph.onnx.operators import KNOWN_ONLY, OPERATORS, Known, Step, Value, to_tensor

__all__ = ["OnnxModule"]

#: Constants of this many numbers or more become parameters or buffers; smaller ones of integers may be sizes.
_SIZES = 64
#: What the inputs of a layer are called that are constants, by their position.
_LAYER = {1: "weight", 2: "bias"}
_ROLES = {
    "Conv": _LAYER, "ConvTranspose": _LAYER, "Gemm": _LAYER, "Linear": _LAYER,
    WEIGHT: {0: "weight", 1: "weight_scale", 2: "weight_zero_point"},
}  # fmt: skip


class _Forward:
    """The forward of each module by the names of its own inputs: in place or by keyword, as :mod:`inspect` shows them."""

    def __get__(self, module: OnnxModule | None, owner: type[OnnxModule]) -> Any:
        if module is None:
            return self

        def forward(*inputs: Tensor, **named: Tensor) -> Any:
            """The graph's output, or a tuple of them."""
            try:
                bound = module.signature.bind(*inputs, **named)
            except TypeError as error:
                names, given = module.arguments, ", ".join([str(len(inputs)), *named])
                raise CATValueError(
                    f"the ONNX model takes {len(names)} inputs ({', '.join(names)}); got {given}"
                ) from error
            return module.run(bound.args)

        forward.__signature__ = module.signature  # type: ignore[attr-defined]
        return forward


class OnnxModule(nn.Module):
    """The steps of an ONNX graph, run in order.

    Parameters
    ----------
    steps : list of Step
        In order of execution.
    constants : dict of str to ndarray
        Initializers by name.
    inputs, outputs : list of str
        Names of the graph's inputs, in the order of the arguments, and of its outputs.

    Notes
    -----
    It is called with the inputs in their order, or by :attr:`arguments`: their names, as Python writes them.

    Layers whose weights are constants hold them as ``<node>.weight`` and ``<node>.bias``, other constants are buffers
    of ``constants``. Sizes are computed by Python, so that :func:`torch.export.export` sees a batch of any size.
    """

    def __init__(
        self,
        steps: list[Step],
        constants: dict[str, np.ndarray[Any, Any]],
        inputs: list[str],
        outputs: list[str],
    ) -> None:
        super().__init__()
        self.input_names, self.output_names = list(inputs), list(outputs)
        self.arguments: list[str] = []
        for name in inputs:
            plain = _identifier(name)
            while plain in self.arguments or keyword.iskeyword(plain):
                plain += "_"
            self.arguments.append(plain)
        steps, constants = with_ranges(steps, constants)
        known = {name: Known(array) for name, array in constants.items()}
        steps = recurrent_layers(integer_weights(_fold(steps, known), known), known)
        self._steps = _as_linear(steps, known, set(outputs))
        self._known = {name: value.array for name, value in known.items()}
        self._paths: dict[str, str] = {}
        self._register()
        self.training = False
        #: Whether the file quantizes what it computes.
        self.quantized = any(step.op == "QuantizeLinear" for step in self._steps)

    def _register(self) -> None:
        """Make parameters and buffers of the constants that are read as tensors."""
        self.constants = nn.Module()
        read = Counter(name for step in self._steps for name in step.inputs if name in self._known)
        for step in self._steps:
            roles = _ROLES.get(step.op) or parameter_names(step)
            for position, name in enumerate(step.inputs):
                array = self._known.get(name)
                if array is None or name in self._paths:
                    continue
                small = array.dtype.kind in "iub" and array.size <= _SIZES and array.ndim < 2
                if (small or array.size == 1) and step.op != WEIGHT:
                    continue
                stem = _identifier(step.name)
                if position in roles and read[name] == 1:
                    holder = getattr(self, stem, None)
                    if holder is None:
                        self.add_module(stem, holder := nn.Module())
                    path, leaf = f"{stem}.", roles[position]
                else:
                    holder, path, leaf = self.constants, "constants.", _identifier(name)
                while hasattr(holder, leaf):
                    leaf += "_"
                tensor = torch.from_numpy(np.array(array))
                if (
                    tensor.is_floating_point()
                    and leaf.startswith(("weight", "bias"))
                    and step.op != WEIGHT
                    and holder is not self.constants
                ):
                    holder.register_parameter(leaf, nn.Parameter(tensor))
                else:
                    holder.register_buffer(leaf, tensor)
                self._paths[name] = path + leaf
        used = set(read) | set(self.output_names)
        self._known = {name: array for name, array in self._known.items() if name in used}

    forward = _Forward()

    @property
    def signature(self) -> inspect.Signature:
        """The inputs by :attr:`arguments`."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in self.arguments])

    def run(
        self, inputs: tuple[Tensor, ...], seen: Callable[[Step, list[Value], Any], Any] | None = None
    ) -> Any:
        """As :meth:`forward`; `seen` gets each step with its inputs and what it gave, and returns what to go on with."""
        values: dict[str, Value] = {"": None, **dict(zip(self.input_names, inputs, strict=True))}
        for name, array in self._known.items():
            path = self._paths.get(name)
            tensor = None
            if path is not None:
                owner, _, leaf = path.rpartition(".")
                tensor = getattr(self.get_submodule(owner), leaf)
            values[name] = Known(array, tensor)
        for step in self._steps:
            given = [values[name] for name in step.inputs]
            result = _execute(step, list(given))
            if seen is not None:
                result = seen(step, given, result)
            parts = result if isinstance(result, tuple) else (result,)
            values.update(zip(step.outputs, parts, strict=False))
        results = tuple(to_tensor(values[name]) for name in self.output_names)
        return results[0] if len(results) == 1 else results

    def extra_repr(self) -> str:
        """What it takes and gives, and of how many steps it is made."""
        return f"{', '.join(self.input_names)} -> {', '.join(self.output_names)}, {len(self._steps)} steps"


def _identifier(name: str) -> str:
    """A name that an attribute of a module can have."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "node"
    return plain if not plain[0].isdigit() and not hasattr(nn.Module, plain) else f"node_{plain}"


def _execute(step: Step, values: list[Value]) -> Any:
    """Run one step: on known numbers where all are, else on tensors."""
    while values and values[-1] is None:
        values.pop()
    if step.op in KNOWN_ONLY and all(isinstance(value, Known) and value.tensor is None for value in values):
        function = KNOWN_ONLY[step.op]
    elif step.op in OPERATORS:
        function = OPERATORS[step.op]
    else:
        raise step.refuse("the operator is not known; give a file without it, or cut the model before it")
    try:
        return function(step, *values)
    except (CATError, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        shapes = [
            tuple(value.shape) if isinstance(value, Tensor) else value and value.array.shape
            for value in values
        ]
        message = str(error).partition("\n")[0]
        raise step.refuse(f"{message} (inputs of shapes {', '.join(map(str, shapes))})") from error


def _fold(steps: list[Step], known: dict[str, Known]) -> list[Step]:
    """Compute the steps whose inputs are all constants; what they give joins the constants."""
    left = []
    with torch.no_grad():
        for step in steps:
            names = [name for name in step.inputs if name]
            computed = step.op.startswith("Random") or is_weight(step, known)
            if computed or not all(name in known for name in names):
                left.append(step)
                continue
            result = _execute(step, [known.get(name) for name in step.inputs])
            for name, part in zip(
                step.outputs, result if isinstance(result, tuple) else (result,), strict=False
            ):
                known[name] = part if isinstance(part, Known) else Known(part.numpy())
    return left


def _as_linear(steps: list[Step], known: dict[str, Known], outputs: set[str]) -> list[Step]:
    """Write MatMul and Gemm by constant matrices as linear layers, with the bias that is added behind.

    Quantizers know linear layers; a product with a transposed constant is none to them.
    """
    readers = Counter(name for step in steps for name in step.inputs)
    by_input = {name: step for step in steps for name in step.inputs}
    gone: set[int] = set()
    result = []
    for step in steps:
        if id(step) in gone:
            continue
        weight = known.get(step.inputs[1]) if len(step.inputs) > 1 else None
        flat = weight is not None and weight.array.ndim == 2 and weight.array.dtype.kind == "f"
        if step.op == "MatMul" and flat and step.inputs[0] not in known:
            assert weight is not None
            turned = f"{step.inputs[1]}\0turned"
            known[turned] = Known(np.ascontiguousarray(weight.array.T))
            inputs, last = [step.inputs[0], turned], step.outputs[0]
            after = by_input.get(last)
            if after is not None and after.op == "Add" and readers[last] == 1 and last not in outputs:
                other = next((name for name in after.inputs if name != last), "")
                bias = known.get(other)
                wide = weight.array.shape[1]
                if bias is not None and bias.array.size == wide and bias.array.shape[-1:] == (wide,):
                    known[f"{other}\0row"] = Known(bias.array.reshape(-1))
                    inputs.append(f"{other}\0row")
                    last = after.outputs[0]
                    gone.add(id(after))
            step = Step("Linear", step.name, tuple(inputs), (last,), {}, step.opset, step.fixed_batch)
        elif step.op == "Gemm" and flat and not step.get("transB", 0):
            assert weight is not None
            turned = f"{step.inputs[1]}\0turned"
            known[turned] = Known(np.ascontiguousarray(weight.array.T))
            inputs = [step.inputs[0], turned, *step.inputs[2:]]
            attributes = {**step.attributes, "transB": 1}
            step = Step(
                "Gemm", step.name, tuple(inputs), step.outputs, attributes, step.opset, step.fixed_batch
            )
        result.append(step)
    return result
