"""From a torch ``ExportedProgram`` to a relax module with the symbolic operators of :mod:`tvm_backend.dialect`.

TVM's importer does the ordinary operators; the converters here add ``quantized_decomposed`` and the ``cat`` operators.
The program is checked first, so that an operator nobody can convert is named together with its place in the model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from cat_plugin.errors import CompileError
from cat_plugin.graph.manifest import corrections
from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import QParams

__all__ = ["import_program"]

_log = logging.getLogger("cat_plugin")

Converter = Callable[[Any, Any], Any]


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _argument(node: Any, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _where(node: Any) -> str:
    """A few words on where in the model a node stands."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return f"node {node.name!r}" + (f" in module {path!r}" if path else "")


def _scalar(value: Any, importer: Any) -> float:
    """A scale or zero point: a number, or a tensor of one element that is constant in the program."""
    if isinstance(value, int | float):
        return value
    tensor = importer.cat_constants.get(getattr(value, "name", None))
    if tensor is None or tensor.numel() != 1:
        raise CompileError(
            f"{getattr(value, 'name', value)!r} gives the scale or zero point of a tensor and is computed at run time; "
            "only statically quantized graphs can be compiled to integer kernels"
        )
    return float(tensor.item())


def _qparams(node: Any, importer: Any) -> QParams:
    scale = float(_scalar(_argument(node, 1, "scale"), importer))
    zero_point = int(_scalar(_argument(node, 2, "zero_point"), importer))
    qmin, qmax = int(_argument(node, 3, "quant_min")), int(_argument(node, 4, "quant_max"))
    dtype = _dtype_name(_argument(node, 5, "dtype"))
    return QParams(scale, zero_point, qmin, qmax, dtype)  # type: ignore[arg-type]


def _quantize_per_tensor(node: Any, importer: Any) -> Any:
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(dialect.quantize(x, _qparams(node, importer)))


def _dequantize_per_tensor(node: Any, importer: Any) -> Any:
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(dialect.dequantize(x, _qparams(node, importer)))


def _per_channel(node: Any, importer: Any) -> Any:
    x, scales, zero_points = (importer.env[arg] if arg is not None else None for arg in node.args[:3])
    if zero_points is None:
        raise CompileError(f"{_where(node)}: per-channel quantization without zero points cannot be compiled")
    names = {"axis": "axis", "quant_min": "qmin", "quant_max": "qmax"}
    attributes: dict[str, Any] = {
        short: int(_argument(node, 3 + i, long)) for i, (long, short) in enumerate(names.items())
    }
    attributes["dtype"] = _dtype_name(_argument(node, 6, "dtype"))
    inverse = "dequantize" in node.target.__name__
    make = dialect.dequantize_per_channel if inverse else dialect.quantize_per_channel
    return importer.block_builder.emit(make(x, scales, zero_points, attributes))


def _correction(name: str) -> Converter:
    def convert(node: Any, importer: Any) -> Any:
        operands, alpha = list(node.args), node.kwargs.get("alpha")
        if alpha is None:
            alpha = operands.pop()
        tensors = [importer.env[arg] for arg in operands if arg is not None]
        features = corrections()[name].takes_features and operands[1] is not None
        return importer.block_builder.emit(dialect.correction(name, tensors, alpha, features))

    return convert


CONVERTERS: dict[str, Converter] = {
    "quantize_per_tensor.default": _quantize_per_tensor,
    "quantize_per_tensor.tensor": _quantize_per_tensor,
    "dequantize_per_tensor.default": _dequantize_per_tensor,
    "dequantize_per_tensor.tensor": _dequantize_per_tensor,
    "quantize_per_channel.default": _per_channel,
    "dequantize_per_channel.default": _per_channel,
    **{f"{name}.default": _correction(name) for name in dialect.CORRECTIONS},
}


def _unknown_operators(program: Any, importer: Any) -> list[str]:
    unknown = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if name not in CONVERTERS and name not in importer.convert_map:
            unknown.append(f"{node.target} ({_where(node)})")
    return unknown


def _constants(program: Any) -> dict[str, Any]:
    """The program's parameters, buffers and lifted constants by the name of their placeholder."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if tensor is not None:
            found[spec.arg.name] = tensor
    return found


def import_program(program: Any) -> Any:
    """Import a torch ``ExportedProgram``.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        A QDQ graph: quantized weights and activations with explicit ``quantized_decomposed`` operators, possibly ending in
        one of the ``cat`` correction operators.  The batch dimension may be dynamic.

    Returns
    -------
    tvm.IRModule
        One function, ``main``, from the inputs to the outputs, with the weights as constants.

    Raises
    ------
    CompileError
        When an operator cannot be imported; the message names it and its place in the model.
    """
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    with warnings.catch_warnings():
        # torch 2.13 copies its own pytrees through a class that it deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        program = program.run_decompositions()
    importer = ExportedProgramImporter()
    importer.cat_constants = _constants(program)
    unknown = _unknown_operators(program, importer)
    if unknown:
        raise CompileError(
            f"operators that cannot be imported into TVM {tvm.__version__}: {'; '.join(unknown)}. "
            "Express them by other operators, or keep that part outside of the compiled model"
        )
    try:
        mod = importer.from_exported_program(program, **compat.importer_arguments(CONVERTERS))
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"TVM {tvm.__version__} could not import the graph: {error}") from error
    # With an upper bound of the batch the memory for that many would be planned, and taken, at every call.
    mod["main"] = mod["main"].without_attr("tir_var_upper_bound")
    return mod


def batch_variable(mod: Any) -> Any | None:
    """The symbolic batch size of ``main``, or None when the batch is fixed."""
    batch = dialect.shape_of(mod["main"].params[0])[0]
    return None if isinstance(batch, int) else batch


def function_inputs(mod: Any) -> list[Any]:
    """The relax types of the inputs of ``main``."""
    return [compat.type_of(param) for param in mod["main"].params if isinstance(param, relax.Var)]
