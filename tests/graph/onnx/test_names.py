"""Names of an ONNX file's inputs and outputs, from the file through quantization to what is handed over."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import cat_plugin
from cat_plugin.ptq import QuantSpec, quantize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from cat_plugin.graph.onnx.files import read_model, write_model  # noqa: E402


@pytest.fixture
def path(tmp_path):
    """Two inputs and two outputs, whose names Python cannot write."""
    weights = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["image:0", "w0"], ["a"], name="first"),
        helper.make_node("MatMul", ["in", "w1"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["head/logits:0"], name="sum"),
        helper.make_node("Relu", ["a"], ["boxes"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 6]) for name in ("image:0", "in")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("head/logits:0", "boxes")],
        [numpy_helper.from_array(weights[i], f"w{i}") for i in range(2)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return write_model(model, tmp_path / "net.onnx")


NAMES = ["head/logits:0", "boxes"]


def outputs_of(file):
    return [each.name for each in read_model(file).graph.output]


def test_names_stay_through_quantizing_correcting_saving_and_exporting(path, tmp_path):
    module = cat_plugin.load_onnx(path)
    x, y = torch.randn(2, 32, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(image_0=x, in_=y)[0], module(x, y)[0])
    calls = [{"image_0": x, "in_": y}]
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", logits="head/logits:0", outputs=("boxes", "0"))
    quantized, _ = quantize(module, spec, calls)
    corrected = cat_plugin.correct(quantized, module, calls, logits="head/logits:0")
    assert outputs_of(cat_plugin.export_onnx(corrected, tmp_path / "module.onnx", calls[0])) == NAMES
    bundle = cat_plugin.export_bundle(corrected, calls[0], tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [each["name"] for each in manifest["outputs"]] == NAMES
    assert [each["name"] for each in manifest["inputs"]] == ["image_0", "in_"]
    assert manifest["cluster_affine"]["output"] == NAMES[0]
    written = cat_plugin.export_onnx(bundle, tmp_path / "bundle.onnx")
    assert outputs_of(written) == NAMES
    saved = cat_plugin.load(cat_plugin.save(corrected, tmp_path / "saved") or tmp_path / "saved")
    assert outputs_of(cat_plugin.export_onnx(saved, tmp_path / "saved.onnx", calls[0])) == NAMES


def test_a_single_output_keeps_its_name_and_stays_a_tensor(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"], name="only")]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.eye(6, 4, dtype=np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    module = cat_plugin.load_onnx(write_model(model, tmp_path / "net.onnx"))
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    quantized, _ = quantize(module, QuantSpec(w_bits=8, a_bits=8, preset="fast"), [x])
    assert isinstance(quantized(x), torch.Tensor)
    bundle = cat_plugin.export_bundle(cat_plugin.correct(quantized, module, [x]), x, tmp_path / "bundle")
    assert outputs_of(cat_plugin.export_onnx(bundle, tmp_path / "out.onnx")) == ["logits"]


def test_a_library_has_the_names_too(path, tmp_path):
    pytest.importorskip("tvm", reason="TVM is not installed")
    import tvm_backend

    module = cat_plugin.load_onnx(path)
    x, y = torch.randn(2, 32, 6, generator=torch.Generator().manual_seed(0))
    quantized, _ = quantize(module, QuantSpec(w_bits=8, a_bits=8, preset="fast"), [{"image_0": x, "in_": y}])
    bundle = cat_plugin.export_bundle(quantized, {"image_0": x, "in_": y}, tmp_path / "bundle")
    library = tvm_backend.load(tvm_backend.compile(bundle, out=tmp_path / "model.so").path, verify=True)
    assert [each["name"] for each in library.manifest["outputs"]] == NAMES
    assert [each["name"] for each in library.manifest["inputs"]] == ["image_0", "in_"]
    found = library(in_=y[:3].numpy(), image_0=x[:3].numpy())
    for one, other in zip(found, quantized(x[:3], y[:3]), strict=True):
        assert np.abs(one - other.numpy()).max() < 0.02 * float(other.abs().max())
