"""A QDQ ExportedProgram as ONNX, for the outside consumer of the tests: ONNX's own QuantizeLinear and
DequantizeLinear (8 and 4 bits), and the few float operations that stand between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import ExportedProgram

__all__ = ["to_onnx"]

_TYPES = {
    (-128, 127): TensorProto.INT8,
    (0, 255): TensorProto.UINT8,
    (-8, 7): TensorProto.INT4,
    (0, 15): TensorProto.UINT4,
}


class _Writer:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.names: dict[torch.fx.Node, str] = {}
        signature = program.graph_signature
        self.lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.lifted.update(signature.inputs_to_lifted_tensor_constants)

    def constant(self, value: Any, kind: int | None = None) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(value)
        if kind is not None and kind in (TensorProto.INT4, TensorProto.UINT4):
            tensor = helper.make_tensor(name, kind, array.shape, array.reshape(-1).astype(int).tolist())
        else:
            tensor = numpy_helper.from_array(array, name)
        self.constants.append(tensor)
        return name

    def tensor(self, node: torch.fx.Node) -> np.ndarray:
        key = self.lifted[node.name]
        source = self.program.state_dict if key in self.program.state_dict else self.program.constants
        return source[key].detach().numpy()

    def emit(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def value(self, item: Any) -> str:
        if item.name in self.lifted:
            return self.constant(self.tensor(item))
        return self.names[item]

    def grid(self, scale: Any, zero: Any, low: int, high: int) -> list[str]:
        kind = _TYPES[low, high]
        dtype = np.int8 if low < 0 else np.uint8
        return [
            self.constant(np.asarray(scale, dtype=np.float32)),
            self.constant(np.asarray(zero).astype(dtype), kind),
        ]

    def write(self, node: torch.fx.Node) -> str:
        name, a = str(node.target), node.args
        if name == "quantized_decomposed.quantize_per_tensor.default":
            return self.emit("QuantizeLinear", [self.value(a[0]), *self.grid(*a[1:5])])
        if name == "quantized_decomposed.dequantize_per_tensor.default":
            return self.emit("DequantizeLinear", [self.value(a[0]), *self.grid(*a[1:5])])
        if name == "quantized_decomposed.dequantize_per_channel.default":
            integers = self.constant(self.tensor(a[0]), _TYPES[a[4], a[5]])
            grid = self.grid(self.tensor(a[1]), self.tensor(a[2]), a[4], a[5])
            return self.emit("DequantizeLinear", [integers, *grid], axis=a[3])
        if name == "aten.conv2d.default":
            stride, padding = a[3] if len(a) > 3 else [1, 1], a[4] if len(a) > 4 else [0, 0]
            groups = a[6] if len(a) > 6 else 1
            inputs = [self.value(x) for x in a[:3]]
            return self.emit("Conv", inputs, strides=stride, pads=[*padding, *padding], group=groups)
        if name == "aten.linear.default":
            return self.emit("Gemm", [self.value(x) for x in a[:3]], transB=1)
        if name == "aten.relu.default":
            return self.emit("Relu", [self.value(a[0])])
        if name == "aten.relu6.default":
            limits = [self.constant(np.float32(limit)) for limit in (0, 6)]
            return self.emit("Clip", [self.value(a[0]), *limits])
        if name == "aten.silu.default":
            return self.emit("Mul", [self.value(a[0]), self.emit("Sigmoid", [self.value(a[0])])])
        if name == "aten.add.Tensor":
            return self.emit("Add", [self.value(a[0]), self.value(a[1])])
        if name == "aten.slice.Tensor":
            step = a[4] if len(a) > 4 else 1
            limits = [self.constant(np.array([v], dtype=np.int64)) for v in (a[2], a[3], a[1], step)]
            return self.emit("Slice", [self.value(a[0]), *limits])
        if name == "aten.pad.default":
            rank = node.meta["val"].ndim
            pairs = [[0, 0] for _ in range(rank)]
            for i in range(0, len(a[1]), 2):
                pairs[rank - 1 - i // 2] = list(a[1][i : i + 2])
            pads = np.array([p[0] for p in pairs] + [p[1] for p in pairs], dtype=np.int64)
            return self.emit("Pad", [self.value(a[0]), self.constant(pads)])
        if name == "aten.mean.dim":
            axes = self.constant(np.array(a[1], dtype=np.int64))
            return self.emit("ReduceMean", [self.value(a[0]), axes], keepdims=int(len(a) > 2 and a[2]))
        if name == "aten.flatten.using_ints":
            return self.emit("Flatten", [self.value(a[0])], axis=1)
        raise NotImplementedError(name)


def to_onnx(program: ExportedProgram) -> onnx.ModelProto:
    """ONNX model of opset 21 that computes what the QDQ program does."""
    writer = _Writer(program)
    inputs, outputs = [], []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in writer.lifted:
            writer.names[node] = node.name
            shape = ["n", *[int(s) for s in node.meta["val"].shape[1:]]]
            inputs.append(helper.make_tensor_value_info(node.name, TensorProto.FLOAT, shape))
        elif node.op == "call_function":
            writer.names[node] = writer.write(node)
        elif node.op == "output":
            (result,) = node.args[0]
            shape = ["n", *[int(s) for s in result.meta["val"].shape[1:]]]
            outputs.append(helper.make_tensor_value_info(writer.names[result], TensorProto.FLOAT, shape))
    graph = helper.make_graph(writer.nodes, "qdq", inputs, outputs, writer.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
