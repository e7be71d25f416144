"""ONNX files as torch modules: equal to ONNX Runtime, any batch size, ready to be quantized; clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.errors import CATValueError
from cat_plugin.ptq import QuantSpec, quantize
from tests.ptq.models import GroupedNet, SmallResNet, randomise, small_inputs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from cat_plugin.graph.onnx.files import read_model, write_model  # noqa: E402
from cat_plugin.graph.onnx.operators import OPERATORS  # noqa: E402
from cat_plugin.graph.onnx.sessions import session_of  # noqa: E402


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def file(tmp_path, nodes, constants, shape, out=None, opset=13, kind=TensorProto.FLOAT):
    """Nodes as (operator, inputs, output, attributes), from x to the last output."""
    made = [
        helper.make_node(op, inputs, [output], name=f"n{i}_{op}", **rest)
        for i, (op, inputs, output, rest) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made, "g", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(out or nodes[-1][2], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return write_model(model, tmp_path / "net.onnx")


@pytest.mark.parametrize(("make", "shape"), [(SmallResNet, (6, 3, 12, 12)), (GroupedNet, (6, 4, 8, 8))])
def test_a_network_comes_back_and_is_quantized_by_its_layers_names(tmp_path, make, shape):
    network, x = randomise(make()).eval(), small_inputs(*shape)
    module = cat_plugin.load_onnx(cat_plugin.export_onnx(network, tmp_path / "net.onnx", x))
    assert not module.training
    with torch.no_grad():
        assert torch.allclose(module(x), network(x), atol=1e-5)
        assert torch.allclose(module(x[:1]), network(x[:1]), atol=1e-5)
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=6)
    quantized, _ = quantize(module, spec, [x])
    with torch.no_grad():
        reference = quantize(network, spec, [x])[0](x)
        assert torch.allclose(quantized(x), reference, atol=0.05 * float(reference.abs().max()))
    weights = [name for name, value in module.named_parameters() if value.ndim > 1]
    assert len(weights) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    assert all(name.endswith(".weight") for name in weights)


SIZES = [
    ("Shape", ["x"], "s", {}),
    ("Gather", ["s", "zero"], "n", {"axis": 0}),
    ("Unsqueeze", ["n", "axis"], "n1", {}),
    ("Concat", ["n1", "minus"], "shape", {"axis": 0}),
    ("Reshape", ["x", "shape"], "flat", {}),
]
KNOWN = {"zero": np.int64(0), "axis": np.array([0]), "minus": np.array([-1])}

GRAPHS = {
    "sizes, then a matrix with a bias": (
        [*SIZES, ("MatMul", ["flat", "w"], "p", {}), ("Add", ["b", "p"], "y", {})],
        {**KNOWN, "w": draw(48, 5), "b": draw(5)}, ["n", 3, 4, 4], 13,
    ),
    "a file for a batch of one": (
        [("GlobalAveragePool", ["x"], "p", {}), ("Reshape", ["p", "s"], "f", {}), ("Gemm", ["f", "w", "b"], "y", {"alpha": 0.5})],
        {"s": np.array([1, 3]), "w": draw(3, 5), "b": draw(5)}, [1, 3, 6, 6], 11,
    ),
    "paddings that differ on the two sides": (
        [
            ("Conv", ["x", "w"], "c", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
            ("MaxPool", ["c"], "m", {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0]}),
            ("AveragePool", ["m"], "a", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
            ("ReduceMean", ["a"], "y", {"axes": [2, 3], "keepdims": 0}),
        ],
        {"w": draw(4, 3, 3, 3)}, ["n", 3, 12, 12], 11,
    ),
    "the norms and activations of old exports": (
        [
            ("BatchNormalization", ["x", "g", "b", "b", "v"], "n", {}),
            ("HardSigmoid", ["n"], "h", {}), ("Mul", ["n", "h"], "q", {}), ("Clip", ["q", "lo", "hi"], "c", {}),
            ("PRelu", ["c", "p"], "r", {}), ("Pow", ["r", "two"], "o", {}), ("Softmax", ["o"], "y", {"axis": 1}),
        ],
        {"g": draw(3), "b": draw(3, seed=1), "v": np.abs(draw(3)) + 0.5, "lo": np.float32(-1), "hi": np.float32(6),
         "p": draw(3, 1, 1), "two": np.float32(2)}, ["n", 3, 4, 4], 11,
    ),
    "resizing by factors and to odd sizes": (
        [
            ("Resize", ["x", "", "f"], "a", {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
            ("Resize", ["a", "", "", "s"], "b", {"mode": "nearest"}),
            ("Resize", ["b", "", "g"], "c", {"mode": "linear"}),
            ("ReduceMax", ["c"], "y", {"axes": [3], "keepdims": 0}),
        ],
        {"f": np.float32([1, 1, 2, 3]), "s": np.array([2, 3, 7, 10]), "g": np.float32([1, 1, 1.5, 0.8])}, [2, 3, 4, 4], 13,
    ),
    "slices, a transposition and a split": (
        [
            ("Slice", ["x", "start", "end", "axes", "step"], "a", {}),
            ("Transpose", ["a"], "t", {"perm": [0, 2, 1]}),
            ("Gather", ["t", "last"], "g", {"axis": 1}),
            ("Shape", ["g"], "shape", {}),
            ("Expand", ["one", "shape"], "ones", {}),
            ("Add", ["g", "ones"], "h", {}),
            ("Expand", ["h", "shape"], "i", {}),
            ("Slice", ["i", "all", "far"], "y", {}),
        ],
        {"start": np.array([-1, 1]), "end": np.array([-99, 5]), "axes": np.array([1, 2]), "step": np.array([-2, 2]),
         "last": np.int64(-1), "one": np.float32([[1]]), "all": np.array([0]), "far": np.array([10**9])}, ["n", 5, 7], 13,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_other_exporters(tmp_path, name):
    nodes, constants, shape, opset = GRAPHS[name]
    path = file(tmp_path, nodes, constants, shape, opset=opset)
    module = cat_plugin.load_onnx(path)
    rows = shape[0] if isinstance(shape[0], int) else 4
    x = draw(rows, *shape[1:], seed=5)
    expected = session_of(str(path)).run(None, {"x": x})[0]
    with torch.no_grad():
        assert np.allclose(module(torch.from_numpy(x)).numpy(), expected, atol=1e-5)
        if name == "a file for a batch of one":
            three = module(torch.from_numpy(np.repeat(x, 3, 0))).numpy()
            assert np.allclose(three, np.repeat(expected, 3, 0), atol=1e-5)
    if isinstance(shape[0], str):
        batch = torch.export.Dim("batch", min=1)
        example = (torch.from_numpy(draw(2, *shape[1:])),)
        program = torch.export.export(module, example, dynamic_shapes=({0: batch},), strict=False)
        assert np.allclose(program.module()(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-5)


def test_a_matrix_with_its_bias_is_one_linear_layer(tmp_path):
    nodes, constants, shape, opset = GRAPHS["sizes, then a matrix with a bias"]
    module = cat_plugin.load_onnx(file(tmp_path, nodes, constants, shape, opset=opset))
    assert {name: tuple(value.shape) for name, value in module.named_parameters()} == {
        "n5_MatMul.weight": (5, 48), "n5_MatMul.bias": (5,),
    }  # fmt: skip


def test_the_softmax_can_be_left_out(tmp_path):
    path = file(
        tmp_path, [("Gemm", ["x", "w"], "z", {}), ("Softmax", ["z"], "y", {})], {"w": draw(6, 4)}, ["n", 6]
    )
    x = torch.from_numpy(draw(3, 6))
    with torch.no_grad():
        logits = cat_plugin.load_onnx(path, logits=True)(x)
        assert torch.allclose(cat_plugin.load_onnx(path)(x), logits.softmax(1))
    assert float(logits.sum(1).abs().max()) > 0.1


def test_several_inputs_and_outputs(tmp_path):
    path = file(
        tmp_path, [("Gemm", ["x", "w"], "z", {}), ("Add", ["z", "m"], "y", {})], {"w": draw(6, 4)}, ["n", 6]
    )
    model = read_model(path)
    model.graph.input.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n", 4]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4]))
    module = cat_plugin.load_onnx(write_model(model, path))
    with torch.no_grad():
        y, z = module(torch.zeros(3, 6), torch.ones(3, 4))
    assert torch.equal(y, z + 1)
    with pytest.raises(CATValueError, match="takes 2 inputs"):
        module(torch.zeros(3, 6))


def test_a_wrong_operator_is_found_and_named(tmp_path, monkeypatch):
    path = file(
        tmp_path, [("Relu", ["x"], "a", {}), ("Elu", ["a"], "b", {}), ("Tanh", ["b"], "y", {})], {}, ["n", 6]
    )
    monkeypatch.setitem(OPERATORS, "Elu", lambda step, x: x + 0.1)
    with pytest.raises(CATValueError, match="first node that differs is 'n1_Elu', Elu"):
        cat_plugin.load_onnx(path)
    cat_plugin.load_onnx(path, verify=False)


def test_rounding_that_the_function_multiplies_is_no_difference(tmp_path):
    # A difference of values that hardly differ: a rounding of 1e-7 becomes 1e-3 and more of the result.
    nodes = [("Mul", ["x", "small"], "m", {}), ("Add", ["m", "one"], "a", {}), ("ReduceMean", ["a"], "e", {"axes": [1]}),
             ("Sub", ["a", "e"], "y", {})]  # fmt: skip
    path = file(tmp_path, nodes, {"small": np.float32(1e-5), "one": np.float32(1)}, ["n", 2000], opset=11)
    cat_plugin.load_onnx(path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(
        CATValueError,
        match=r"operators that are not known: Hardmax, SequenceEmpty \(the first is node 'n0_Hardmax'\)",
    ):
        cat_plugin.load_onnx(
            file(tmp_path, [("Hardmax", ["x"], "a", {}), ("SequenceEmpty", [], "y", {})], {}, ["n", 6])
        )
    with pytest.raises(CATValueError, match="opset 5"):
        cat_plugin.load_onnx(file(tmp_path, [("Relu", ["x"], "y", {})], {}, ["n", 6], opset=5))
    integers = [("DynamicQuantizeLinear", ["x"], "q", {}), ("DequantizeLinear", ["q", "s"], "y", {})]
    with pytest.raises(CATValueError, match="integer operators; give one in QDQ format"):
        cat_plugin.load_onnx(file(tmp_path, integers, {"s": np.float32(0.1)}, ["n", 6]), verify=False)(
            torch.zeros(2, 6)
        )
    with pytest.raises(CATValueError, match="input_shapes names y"):
        cat_plugin.load_onnx(
            file(tmp_path, [("Relu", ["x"], "y", {})], {}, ["n", 6]), input_shapes={"y": [3]}
        )
    fixed = [("Reshape", ["x", "s"], "y", {})]
    with pytest.raises(CATValueError, match="takes none of the shapes"):
        cat_plugin.load_onnx(file(tmp_path, fixed, {"s": np.array([2, 6])}, ["n", 6]))
    nodes = [("Resize", ["x", "", "f"], "y", {"mode": "linear", "antialias": 1})]
    path = file(tmp_path, nodes, {"f": np.float32([1, 1, 2, 2])}, ["n", 3, 4, 4], opset=18)
    with pytest.raises(CATValueError, match=r"n0_Resize.*axes or antialias"):
        cat_plugin.load_onnx(path)


def test_sizes_that_the_file_leaves_open(tmp_path):
    nodes = [("Conv", ["x", "w"], "c", {}), ("Flatten", ["c"], "f", {}), ("MatMul", ["f", "m"], "y", {})]
    path = file(tmp_path, nodes, {"w": draw(2, 3, 3, 3), "m": draw(2 * 8 * 3, 4)}, ["n", 3, "h", "w"])
    with pytest.raises(CATValueError, match="give input_shapes"):
        cat_plugin.load_onnx(path)
    module = cat_plugin.load_onnx(path, input_shapes={"x": (3, 10, 5)})
    assert module(torch.zeros(2, 3, 10, 5)).shape == (2, 4)
