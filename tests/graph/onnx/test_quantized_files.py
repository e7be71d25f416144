"""Files that ONNX Runtime quantized: read to the bit, corrected, exported again and compiled to integer kernels."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.errors import CATValueError
from cat_plugin.graph.export import export_program
from tests.ptq.models import GroupedNet, randomise, small_inputs

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from cat_plugin.graph.onnx import onnx_quantized, reading_check
from cat_plugin.graph.onnx.files import write_model
from cat_plugin.graph.onnx.operators import OPERATORS
from cat_plugin.graph.onnx.sessions import session_of


class Rows(CalibrationDataReader):
    """One batch."""

    def __init__(self, x: torch.Tensor) -> None:
        self.left = [{"x": x.numpy()}]

    def get_next(self):
        return self.left.pop() if self.left else None


def by_onnx_runtime(
    folder, network, x, weights="QInt8", activations="QUInt8", *, per_channel=True, **options
):
    """The paths of a network in full precision and as ONNX Runtime quantizes it."""
    full = cat_plugin.export_onnx(network, folder / "fp.onnx", x)
    quant_pre_process(str(full), str(folder / "pre.onnx"), skip_symbolic_shape=True)
    quantize_static(
        str(folder / "pre.onnx"), str(folder / "q.onnx"), Rows(x), per_channel=per_channel,
        weight_type=QuantType[weights], activation_type=QuantType[activations],
        **{"quant_format": QuantFormat.QDQ, **options},
    )  # fmt: skip
    return full, folder / "q.onnx"


def as_it_stands(path, x):
    return session_of(str(path), optimized=False).run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [("QInt8", "QUInt8"), ("QUInt8", "QUInt8"), ("QInt8", "QInt8"), ("QInt4", "QUInt8")],
)
def test_a_static_file_is_read_with_its_integers(tmp_path, weights, activations, per_channel):
    x, network = small_inputs(16, 4, 8, 8), randomise(GroupedNet()).eval()
    _, path = by_onnx_runtime(tmp_path, network, x, weights, activations, per_channel=per_channel)
    module = cat_plugin.load_onnx(path)
    with torch.no_grad():
        for rows in (1, 16):
            assert np.allclose(module(x[:rows]).numpy(), as_it_stands(path, x[:rows]), atol=1e-5)
    held = {name: value for name, value in module.named_buffers() if name.endswith(".weight")}
    assert len(held) == 4
    assert all(value.dtype is torch.int8 for value in held.values())
    if weights == "QInt4":
        assert max(int(value.abs().max()) for value in held.values()) <= 8


def test_it_is_corrected_exported_and_compiled_to_integer_kernels(tmp_path):
    tvm_backend = pytest.importorskip("tvm_backend")
    pytest.importorskip("tvm")
    x, network = small_inputs(64, 4, 8, 8), randomise(GroupedNet()).eval()
    full, path = by_onnx_runtime(tmp_path, network, x)
    corrected = cat_plugin.correct(cat_plugin.load_onnx(path), cat_plugin.load_onnx(full), [x])
    bundle = cat_plugin.export_bundle(corrected, x, tmp_path / "bundle")
    layers = json.loads((bundle / "manifest.json").read_text())["layers"]
    assert [(layer["w_bits"], layer["a_bits"]) for layer in layers] == [(8, 8)] * 4
    with torch.no_grad():
        expected = corrected(x).numpy()
    again = cat_plugin.export_onnx(bundle, tmp_path / "again.onnx")
    assert np.allclose(as_it_stands(again, x), expected, atol=1e-5)
    library = tvm_backend.compile(bundle, out=tmp_path / "model.so")
    # the names of kernels end in digits of what they are made of
    for kernel in (r"conv2d_3x3_12_8_[0-9a-f]+:", r"linear_20_5_[0-9a-f]+:", r"cluster_affine_[0-9a-f]+:"):
        assert re.search(kernel, str(library))
    result = np.asarray(tvm_backend.load(tmp_path / "model.so")(x.numpy()))
    assert np.allclose(result, expected, atol=1e-4 * float(np.abs(expected).max()))


class Products(nn.Module):
    """A matrix that is turned on the way in, without and with something added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 9, bias=False), nn.Linear(9, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_products_become_linear_layers(tmp_path):
    torch.manual_seed(0)
    network, x = Products().eval(), torch.randn(32, 5, 12)
    _, path = by_onnx_runtime(tmp_path, network, x)
    module = cat_plugin.load_onnx(path)
    with torch.no_grad():
        assert np.allclose(module(x).numpy(), as_it_stands(path, x), atol=1e-5)
    program = export_program(module, x)
    linear = [node for node in program.graph.nodes if str(node.target) == "aten.linear.default"]
    assert len(linear) == 2
    assert all("dequantize_per_channel" in str(node.args[1].target) for node in linear)


def test_a_fault_in_reading_is_found_where_rounding_cannot_hide_it(tmp_path, monkeypatch):
    x, network = small_inputs(16, 4, 8, 8), randomise(GroupedNet()).eval()
    _, path = by_onnx_runtime(tmp_path, network, x)
    read = onnx_quantized.unrounded
    monkeypatch.setattr(
        reading_check,
        "unrounded",
        lambda step, given: (read(step, given)[0] + read(step, given)[1] * 2, read(step, given)[1]),
    )
    with pytest.raises(CATValueError, match=r"steps off, where half a step.*DequantizeLinear"):
        cat_plugin.load_onnx(path)
    monkeypatch.undo()
    convolution = OPERATORS["Conv"]
    monkeypatch.setitem(OPERATORS, "Conv", lambda step, *values: convolution(step, *values) * 1.01)
    with pytest.raises(CATValueError, match=r"the first node that differs is .*Conv"):
        cat_plugin.load_onnx(path)


def test_what_is_not_qdq(tmp_path):
    x, network = small_inputs(16, 4, 8, 8), randomise(GroupedNet()).eval()
    _, path = by_onnx_runtime(tmp_path, network, x, quant_format=QuantFormat.QOperator)
    with pytest.raises(CATValueError, match=r"of the operator com\.microsoft|QuantFormat\.QDQ"):
        cat_plugin.load_onnx(path)
    wide = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="wide"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint16(7), "z")],
    )  # fmt: skip
    model = helper.make_model(wide, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(CATValueError, match=r"'wide'.*uint16; expected 8 bits or fewer"):
        cat_plugin.load_onnx(write_model(model, tmp_path / "wide.onnx"))
