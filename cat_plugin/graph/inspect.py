"""Reading facts off an exported QDQ graph: its signature, its quantized layers, its correction."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Node

from cat_plugin.errors import ExportError
from cat_plugin.graph.results import Place, described
from cat_plugin.structures import names_of_results, plain_structure
from cat_plugin.torch_compat import pytree, schema_of

__all__ = ["Correction", "QuantizedLayer", "find_correction", "quantized_layers", "signature"]

_LAYER_OPS = {
    "aten.conv1d.default": "conv1d",
    "aten.conv2d.default": "conv2d",
    "aten.convolution.default": "convolution",
    "aten.linear.default": "linear",
    "aten.addmm.default": "linear",
    "aten.mm.default": "linear",
    "aten.matmul.default": "matmul",
}
_WEIGHT_POSITION = {"aten.addmm.default": 2}
_RESHAPES = {"aten.reshape.default", "aten.view.default", "aten._unsafe_view.default", "aten.clone.default"}
_VIEWS = {"aten.t.default", "aten.transpose.int", "aten.permute.default"}


@dataclass(frozen=True)
class QuantizedLayer:
    """One convolution or linear layer of a QDQ graph.

    Attributes
    ----------
    name : str
        Qualified name of the layer's weight, without the final ``.weight``.
    kind : str
        ``"conv1d"``, ``"conv2d"``, ``"convolution"``, ``"linear"`` or ``"matmul"``.
    w_bits, a_bits : int or None
        Bit-widths of weight and input; None where it stays in float.
    weight_shape : tuple of int
        Shape of the weight.
    """

    name: str
    kind: str
    w_bits: int | None
    a_bits: int | None
    weight_shape: tuple[int, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight when packed densely at its bit-width."""
        return -(-int(np.prod(self.weight_shape)) * (self.w_bits or 32) // 8)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return {**asdict(self), "weight_shape": list(self.weight_shape)}


@dataclass(frozen=True)
class Correction:
    """The cluster-affine step at the end of a graph: which op, with which numbers.

    Attributes
    ----------
    op, arrays, alpha
        Of the op.
    output, class_axis : int or None
        Which of the graph's outputs is corrected, and its axis of classes.
    """

    op: str
    arrays: dict[str, np.ndarray[Any, Any]]
    alpha: float
    output: int | None = None
    class_axis: int | None = None


def _target(node: Node) -> str:
    return str(node.target) if node.op == "call_function" else ""


def _dequantized_bits(node: Node) -> int | None:
    """Return the bit-width of the integers that `node` dequantizes, or None when it yields plain floats."""
    while _target(node) in _VIEWS:
        node = node.all_input_nodes[0]
    target = _target(node)
    if "quantized_decomposed.dequantize_per_" not in target:
        return None
    schema = schema_of(node.target).arguments
    values = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    levels = int(values["quant_max"]) - int(values["quant_min"]) + 1
    return (levels - 1).bit_length()


def _source_name(node: Node, program: ExportedProgram) -> str | None:
    """Return the qualified name of the parameter or buffer that `node` is computed from, if it is one."""
    signature_ = program.graph_signature
    names = {
        **signature_.inputs_to_parameters,
        **signature_.inputs_to_buffers,
        **signature_.inputs_to_lifted_tensor_constants,
    }
    while node.op != "placeholder":
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return names.get(node.name)


def _constant(node: Node, program: ExportedProgram) -> torch.Tensor:
    name = _source_name(node, program)
    if node.op != "placeholder" or name is None:
        raise ExportError(
            f"an argument of the cluster-affine op is computed in the graph ({node.name}); expected a buffer: "
            "append the step with cat_plugin.correct"
        )
    constant = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(constant, torch.Tensor):
        raise ExportError(f"{name} is a {type(constant).__name__}; expected a tensor")
    return constant


def quantized_layers(program: ExportedProgram) -> list[QuantizedLayer]:
    """List the convolution and linear layers of a graph with their bit-widths.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        A QDQ graph, of ours or of any PT2E quantizer.

    Returns
    -------
    list of QuantizedLayer
        In order of execution; layers left in float are listed with bits of None.
    """
    layers = []
    for node in program.graph.nodes:
        target = _target(node)
        if target not in _LAYER_OPS:
            continue
        at = _WEIGHT_POSITION.get(target, 1)
        weight, data = node.args[at], node.args[at - 1]
        shape = weight.meta["val"].shape
        source = _source_name(weight, program)
        # a product of two activations; to make an integer of its batch axis would fix the program's batch size
        if source is None or not all(isinstance(extent, int) for extent in shape):
            continue
        stem = source.rstrip("_").removesuffix("weight").rstrip("._") or source
        layers.append(
            QuantizedLayer(
                name=stem,
                kind=_LAYER_OPS[target],
                w_bits=_dequantized_bits(weight),
                a_bits=_dequantized_bits(data),
                weight_shape=tuple(shape),
            )
        )
    return layers


def find_correction(program: ExportedProgram) -> Correction | None:
    """Return the cluster-affine step of a graph, or None when it has none.

    Raises
    ------
    ExportError
        When the graph holds more than one such step, or one whose parameters are not buffers.
    """
    nodes = [node for node in program.graph.nodes if _target(node).startswith("cat.cluster_affine")]
    if not nodes:
        return None
    if len(nodes) > 1:
        raise ExportError(
            f"the graph holds {len(nodes)} cluster-affine steps; expected one: correct a model once"
        )
    (node,) = nodes
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    alpha = 1.0
    for argument, value in zip(schema_of(node.target).arguments, node.args, strict=False):
        if argument.name == "alpha":
            alpha = float(value)
        elif argument.name not in ("logits", "features") and value is not None:
            arrays[argument.name] = _constant(value, program).detach().cpu().numpy()
    where = _corrected_output(program, node) or (None, None)
    return Correction(_target(node).split(".")[1], arrays, alpha, *where)


def signature(program: ExportedProgram) -> dict[str, Any]:
    """Describe the tensors that a graph takes and returns.

    Returns
    -------
    dict
        ``inputs`` and ``outputs``, each a list of name, dtype and shape, where the dynamic batch is ``"N"``
        and a length that any sequence has ``"T"``; ``result``, the
        structure around the outputs (:mod:`cat_plugin.graph.results`).  Outputs have the names that the exported model gave
        them, else they are named by what leads to them: keys, fields and numbers with dots between; a single one is
        ``output``.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    taken = program.graph_signature.input_specs
    inputs = [
        spec.arg.name
        for spec in taken
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    sizes = [extent for name in inputs for extent in nodes[name].meta["val"].shape]
    free = list(dict.fromkeys(str(extent) for extent in sizes if not isinstance(extent, int)))
    called = dict(zip(free, ("N", "T"), strict=False))

    def written(extent: Any) -> int | str:
        if isinstance(extent, int):
            return int(extent)
        return re.sub(r"\b\w+\b", lambda found: called.get(found[0], found[0]), str(extent))

    def describe(name: str, node: Node) -> dict[str, Any]:
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        return {"name": name, "dtype": dtype, "shape": [written(extent) for extent in value.shape]}

    leaves = _results(program)
    tensors = iter(range(len(leaves)))
    placed = [Place(next(tensors)) if isinstance(leaf, Node) else leaf for leaf in leaves]
    spec = program.call_spec.out_spec
    whole = pytree.tree_unflatten(placed, spec) if spec is not None else tuple(placed)
    every = zip(names_of_results(program.graph_module, whole), placed, strict=True)
    names = [name for name, leaf in every if isinstance(leaf, Place)]
    return {
        "inputs": [describe(name, nodes[name]) for name in inputs],
        "outputs": [
            describe(name, leaf)
            for name, leaf in zip(names, (leaf for leaf in leaves if isinstance(leaf, Node)), strict=True)
        ],
        "result": described(plain_structure(whole)),
    }


def _results(program: ExportedProgram) -> list[Any]:
    """The leaves of what a graph returns: nodes, and what is no tensor as it is."""
    nodes = {node.name: node for node in program.graph.nodes}
    given = [each.arg for each in program.graph_signature.output_specs if each.kind is OutputKind.USER_OUTPUT]
    return [
        nodes[arg.name] if isinstance(arg, TensorArgument) else getattr(arg, "value", None) for arg in given
    ]


def _corrected_output(program: ExportedProgram, step: Node) -> tuple[int, int] | None:
    """Which output, among those that are tensors, the correction makes, and its axis of classes; None where it is none.

    Rows are put into the logits' shape behind the correction, and the classes back to their axis.
    """
    returned = [leaf for leaf in _results(program) if isinstance(leaf, Node)]
    left: list[tuple[Node, int]] = [(step, 1)]
    while left:
        node, axis = left.pop()
        if node in returned:
            return returned.index(node), axis
        for user in node.users:
            target, ndim = _target(user), getattr(user.meta.get("val"), "ndim", 0)
            arguments: Any = user.args
            if target in _RESHAPES:
                left.append((user, ndim - 1))
            elif target == "aten.movedim.int" and int(arguments[1]) % ndim == axis:
                left.append((user, int(arguments[2]) % ndim))
            elif target == "aten.permute.default":
                left.append((user, [int(each) % ndim for each in arguments[1]].index(axis)))
    return None
