"""ONNX files read as torch modules, compared with ONNX Runtime before they are handed out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cat_plugin.errors import CATValueError
from cat_plugin.graph.onnx.files import need, read_model
from cat_plugin.graph.onnx.imported import OnnxModule
from cat_plugin.graph.onnx.onnx_recurrent import RECURRENT
from cat_plugin.graph.onnx.operators import OPERATORS, Step
from cat_plugin.graph.onnx.reading_check import Input, verify_module

__all__ = ["load_onnx"]

_log = logging.getLogger("cat_plugin")

#: Opsets of the standard operators that can be read.
_OPSETS = range(7, 26)


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
        A model of the standard operators, opset 7 to 25, in full precision or quantized in QDQ format to 8 bits or fewer.
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
        In evaluation mode. Takes the file's inputs in their order, or by their names as Python writes them (``images:0`` is
        ``images_0``), gives its output or a tuple of them; any batch size, also where the file declares a batch of one. What
        is made of it (quantized and corrected models, bundles, libraries, ONNX files) calls the outputs as the file does.

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
        if step.op not in OPERATORS and step.op not in ("Constant", "Range", "ConstantOfShape", *RECURRENT)
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
        verify_module(module, model, inputs, dict(input_shapes or {}), fixed)
    return module.eval()


def _inputs(model: Any) -> list[Input]:
    held = {each.name for each in model.graph.initializer}
    found = []
    for each in model.graph.input:
        if each.name in held:
            continue
        tensor = each.type.tensor_type
        shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
        found.append(Input(each.name, tensor.elem_type, shape))
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
