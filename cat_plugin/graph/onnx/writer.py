"""What a converter of one ATen operation writes with: names, constants, sizes, and the registry of converters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from cat_plugin.errors import ExportError
from cat_plugin.graph.onnx.files import need
from cat_plugin.graph.onnx.step import Fragment

__all__ = ["CONVERTERS", "Converter", "Writer", "arguments_of", "converts", "operation_of", "place_of"]

Converter = Callable[["Writer", Node, dict[str, Any]], str]

#: One converter for each operation, by the name that its node prints.
CONVERTERS: dict[str, Converter] = {}


def converts(*operations: str) -> Callable[[Converter], Converter]:
    """Register a function as the converter of these operations.

    It is called with the writer, the node and its arguments by name, defaults filled in, and returns the name of the
    ONNX value that stands for the node.
    """

    def register(function: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(operations, function))
        return function

    return register


def place_of(node: Node) -> str:
    """Where an operation stands in the model that was exported, for messages."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, kind = list(stack.values())[-1][:2]
        kind = kind if isinstance(kind, str) else kind.__qualname__
        return f"{path or 'the outermost module'} ({kind.rpartition('.')[2]})"
    return f"node {node.name}"


class Writer(Fragment):
    """ONNX nodes and constants for one exported program.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        A QDQ graph; left as it is.
    opset : int
        Version of the standard operators to write.
    """

    def __init__(self, program: ExportedProgram, opset: int) -> None:
        super().__init__(prefix="")
        self.program = program
        self.opset = opset
        self.names: dict[Node, str] = {}
        #: Names of the parts of results that are tuples.
        self.parts: dict[Node, list[str]] = {}
        self._symbols: dict[str, str] = {}
        signature = program.graph_signature
        self._lifted: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._fixed = self._without_inputs()
        quantizers = [
            node
            for node in program.graph.nodes
            if str(node.target).startswith("quantized_decomposed.quantize_per_tensor")
        ]
        #: Whether bytes of activations keep their sign: all zero points are 0, or something else than a dequantizer reads them.
        self.signed = all(arguments_of(node)["zero_point"] == 0 for node in quantizers) or any(
            "quantized_decomposed.dequantize" not in str(user.target)
            for node in quantizers
            for user in node.users
        )
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._taken: set[str] = set()

    def fresh(self, stem: str) -> str:
        """A name that no value has yet."""
        name, number = stem, 1
        while name in self._taken:
            name, number = f"{stem}_{number}", number + 1
        self._taken.add(name)
        return name

    def is_constant(self, item: Any) -> bool:
        """Whether a node is a parameter, a buffer or a constant of the program."""
        return isinstance(item, Node) and item.name in self._lifted

    def tensor(self, item: Any) -> torch.Tensor:
        """The values of such a node.

        Raises
        ------
        ExportError
            When the node is computed in the graph.
        """
        if not self.is_constant(item):
            raise ExportError(
                f"an argument of {getattr(item, 'target', item)} is computed in the graph; ONNX takes a constant there"
            )
        key = self._lifted[item.name]
        values = self.program.state_dict.get(key, self.program.constants.get(key))
        if not isinstance(values, torch.Tensor):
            raise ExportError(f"{key} is a {type(values).__name__}; expected a tensor")
        return values.detach().cpu()

    def _without_inputs(self) -> set[Node]:
        """Constants, and operations that depend on these alone and give the same at every call."""
        found: set[Node] = set()
        for node in self.program.graph.nodes:
            operation: Any = node.target
            repeatable = (
                node.op == "call_function"
                and hasattr(operation, "_schema")
                and torch.Tag.nondeterministic_seeded not in operation.tags
            )
            if self.is_constant(node) or (repeatable and found.issuperset(node.all_input_nodes)):
                found.add(node)
        return found

    def _known(self, item: Node) -> Any:
        """What a node gives that depends on no input."""
        if self.is_constant(item):
            return self.tensor(item)
        args: Any = map_arg((item.args, item.kwargs), self._known)
        with torch.no_grad():
            return item.target(*args[0], **args[1])  # type: ignore[operator]

    def constant(self, array: Any, name: str = "constant") -> str:
        """Store an array, once for equal ones; returns its name."""
        array = np.asarray(array, order="C")
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.fresh(name)
            self.initializers.append(need("onnx").numpy_helper.from_array(array, self._shared[key]))
        return self._shared[key]

    def emit(self, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Append a node of one output; returns the output's name."""
        return self.emit_many(op, inputs, 1, name, **attributes)[0]

    def emit_many(
        self, op: str, inputs: Sequence[str], count: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node of `count` outputs; returns their names."""
        computed = [key for key, value in attributes.items() if isinstance(value, Node)]
        if computed:
            raise ExportError(f"{computed[0]} is computed in the graph; ONNX takes a number there")
        outputs = [self.fresh(name or op.lower()) for _ in range(count)]
        self.nodes.append(
            need("onnx").helper.make_node(op, list(inputs), outputs, name=outputs[0], **attributes)
        )
        return outputs

    def value(self, item: Any, dtype: torch.dtype | None = None) -> str:
        """Name of the value of a node or a number, cast to `dtype` where it has another."""
        if isinstance(item, Node):
            if item not in self.names:
                self.names[item] = self.constant(_array(self.tensor(item)), self._lifted[item.name])
            held = item.meta["val"]
            name = self.names[item]
            if not isinstance(held, torch.Tensor):
                name = self.emit("Reshape", [name, self.integers([])])
                return name if dtype in (None, torch.int64) else self.cast(name, dtype)
            return name if dtype in (None, held.dtype) else self.cast(name, dtype)
        return self.constant(_array(torch.tensor(item, dtype=dtype or torch.get_default_dtype())), "number")

    def cast(self, name: str, dtype: torch.dtype | None) -> str:
        """Append a Cast."""
        return self.emit("Cast", [name], to=self.element_type(dtype or torch.float32))

    def element_type(self, dtype: torch.dtype) -> int:
        """ONNX's number of a torch dtype."""
        onnx = need("onnx")
        if dtype is torch.bfloat16:
            return int(onnx.TensorProto.BFLOAT16)
        return int(onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype))

    def integers(self, values: Sequence[int]) -> str:
        """Name of a constant int64 vector."""
        return self.constant(np.asarray(values, dtype=np.int64).reshape(-1), "integers")

    def sizes(self, values: Sequence[Any]) -> str:
        """Name of an int64 vector of sizes, some of which the graph computes."""
        if not any(isinstance(value, Node) for value in values):
            return self.integers([int(value) for value in values])
        parts = [
            self.names[value] if isinstance(value, Node) else self.integers([int(value)]) for value in values
        ]
        return self.emit("Concat", parts, axis=0) if len(parts) > 1 else parts[0]

    def described(self, name: str, value: torch.Tensor) -> Any:
        """Name, type and shape of an input or output; the first size that is not known is the batch's."""
        shape: list[int | str] = []
        for size in value.shape:
            if not isinstance(size, int):
                unknown = "batch" if not self._symbols else str(size)
                size = self._symbols.setdefault(str(size), unknown)
            shape.append(size)
        return need("onnx").helper.make_tensor_value_info(name, self.element_type(value.dtype), shape)

    def write(self, node: Node) -> None:
        """Convert one call.

        Raises
        ------
        ExportError
            When there is no converter, or it does not take these arguments.
        """
        target = str(node.target)
        convert = CONVERTERS.get(operation_of(node))
        value = self._known(node) if convert is None and node in self._fixed else None
        if isinstance(value, torch.Tensor):
            self.names[node] = self.constant(_array(value.contiguous()), node.name)
            return
        if convert is None:
            raise ExportError(
                f"the operation {target} in {place_of(node)} cannot be written as ONNX; export a part of the model, or "
                "replace it in the model by operations that can"
            )
        try:
            self.names[node] = convert(self, node, arguments_of(node))
        except ExportError as error:
            raise ExportError(f"{target} in {place_of(node)}: {error}") from error


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def operation_of(node: Node) -> str:
    """The name that a converter is registered under: functions of sizes go by their own, all corrections by one."""
    if str(node.target).startswith("cat."):
        return "cat"
    return str(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", "")


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in; by position where there is no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(enumerate(node.args))  # type: ignore[arg-type]
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    return {**given, **node.kwargs}
